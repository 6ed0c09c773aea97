"""Which verb a recipe is for, by the keys that it has."""

from collections.abc import Collection

# All top-level keys, as text: other verbs' recipes are not imported to read one.
_KEYS = {
    "qwen-moe train": "run_dir seed sample_prompt model data training objective rollout optimizer schedule balance "
    "precision parallel checkpoint logging launch stages",
    "qwen-moe post-train": "run_dir model start common sft rollout pairs dpo reward_model grpo measure",
    "qwen-moe data curate": "run_dir input tasks workers words on_bad_line filters scores domains deduplication "
    "decontamination weights prepare synthesise slurm",
}
VERBS = {verb: frozenset(keys.split()) for verb, keys in _KEYS.items()}


def verb_of(unknown: Collection[str]) -> str | None:
    """The verb whose recipes have all of these top-level keys, which are unknown to another verb. None if there is none,
    or a single key, which may be a slip."""
    if len(unknown) < 2:
        return None
    return next((verb for verb, keys in VERBS.items() if keys.issuperset(unknown)), None)

"""A walk is one `qwen-moe post-train`. What each of its steps works on: folder, first model, and recipe or command."""

import json
from pathlib import Path
from typing import Any

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.data.inputs import TOKENIZER
from qwen_moe.errors import UserError
from qwen_moe.generation.prompts import form_of, prompt_lines
from qwen_moe.generation.tokenizer import tokenizer_folder
from qwen_moe.posttraining.recipe import NUMBERS, OF_WALK, TRAINED, Rewarded, WalkConfig, merged
from qwen_moe.rollout.queries import id_of, note_id
from qwen_moe.rollout.rewards import Rewarder, RewardSettings, check_values

MEASURED, DATA = "measured", "data"


class Walk:
    """The steps of ``config``, which was read from ``source``. Raises one UserError for all mistakes in the recipes of its
    training steps and in its queries."""

    def __init__(self, config: WalkConfig, source: str) -> None:
        self.config, self.source, self.run_dir = config, source, config.run_dir
        self.recipes: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, RunConfig] = {}
        mistakes: list[str] = []
        for step in config.steps:
            if step not in TRAINED:
                continue
            try:
                self.recipes[step] = self._recipe(step)
                self.runs[step] = parse_config(self.recipes[step], step)
            except UserError as error:
                mistakes.append(str(error))
        mistakes += self._mistakes_of_queries()
        if mistakes:
            raise UserError(f"{source}: " + "; ".join(dict.fromkeys(mistakes)))

    def folder(self, step: str) -> Path:
        """Of a training step, its run folder."""
        return self.run_dir / f"{NUMBERS[step]}-{step}"

    def recipe_file(self, step: str) -> Path:
        return self.run_dir / f"{NUMBERS[step]}-{step}.yaml"

    def measured_folder(self, model: str) -> Path:
        return self.run_dir / MEASURED / model

    @property
    def pairs_prefix(self) -> Path:
        return self.folder("pairs") / "pairs"

    def begins_from(self, step: str) -> str | None:
        """The name of the model that ``step`` begins from or samples: a step, or ``start``; None for initial values."""
        before = {"sft": (), "grpo": ("dpo", "sft")}.get(step, ("sft",))
        found = next((name for name in before if name in self.config.steps), None)
        return found or ("start" if self.config.start is not None else None)

    def model(self, name: str) -> Path:
        """The path of a model by its name."""
        if name == "start":
            assert self.config.start is not None
            return self.config.start
        return self.folder(name)

    def reads(self, step: str) -> tuple[str, ...]:
        """The steps whose output ``step`` works on."""
        found = [self.begins_from(step)]
        if step in ("dpo", "reward_model"):
            found.append("pairs" if self._learns_from_pairs(step) else None)
        elif step == "pairs":
            found = ["rollout"]
        elif step == "grpo":
            asked = self._section("grpo").get("rollout", {})
            found.append("reward_model" if asked.get("reward_model") == OF_WALK else None)
            found.append("rollout" if asked.get("variances") == OF_WALK else None)
        return tuple(name for name in found if name is not None and name != "start")

    def _section(self, step: str) -> dict[str, Any]:
        return getattr(self.config, step) or {}

    def _learns_from_pairs(self, step: str) -> bool:
        data = merged(self.config.common.get("data") or {}, self._section(step).get("data") or {})
        return self.config.pairs is not None and not data.get("train") and not data.get("prepare")

    def _recipe(self, step: str) -> dict[str, Any]:
        """The recipe of a training step, as `qwen-moe train` reads it."""
        section = dict(self._section(step))
        objective = section.pop("objective", {})
        if isinstance(objective, str):
            objective = {"kind": objective}
        if not isinstance(objective, dict) or objective.get("kind", step) != step:
            raise UserError(f"{step}: objective is {objective!r}, and this step's is {step}: leave its kind out")
        head = {"run_dir": str(self.folder(step)), "objective": {"kind": step, **objective}, "model": self.config.model}
        values = merged(head, merged(self.config.common, section))
        if wrong := [name for name in ("data", "checkpoint") if not isinstance(values.setdefault(name, {}), dict)]:
            raise UserError(f"{step}: {wrong[0]} is {values[wrong[0]]!r:.60}, expected a section")
        self._add_data(step, values)
        before = self.begins_from(step)
        if before is not None:
            values["checkpoint"] = {"load_from": str(self.model(before))} | values["checkpoint"]
        return values

    def _add_data(self, step: str, values: dict[str, Any]) -> None:
        """Add the data that the walk knows: pairs, tokenizer, and where prepared data go."""
        data = values["data"] = dict(values["data"])
        prepare = data.get("prepare")
        if isinstance(prepare, dict):
            data["prepare"] = {"output": str(self.run_dir / DATA / step)} | prepare
        if step in ("dpo", "reward_model") and self._learns_from_pairs(step):
            data["train"] = [{"prefix": str(self.pairs_prefix)}]
        own = isinstance(prepare, dict) and prepare.get("train_tokenizer")
        if not data.get("tokenizer") and not own:
            data["tokenizer"] = self._tokenizer(step)
        if step == "grpo":
            self._add_paths(values)

    def _tokenizer(self, step: str) -> str | None:
        """The tokenizer of the model that ``step`` begins from."""
        before = self.begins_from(step)
        if before is None:
            return None
        if before != "start":
            return str(self.folder(before) / TOKENIZER)
        try:
            return str(tokenizer_folder(self.model(before)))
        except UserError as error:
            raise UserError(f"start: {error}") from None

    def _add_paths(self, values: dict[str, Any]) -> None:
        """Replace `step` in the section rollout of GRPO by what the walk makes."""
        rollout = values.get("rollout")
        if not isinstance(rollout, dict):
            raise UserError("grpo: the section rollout is missing: give its queries, episodes and rewards")
        values["rollout"] = rollout = dict(rollout)
        for key, step in (("reward_model", "reward_model"), ("variances", "rollout")):
            if rollout.get(key) != OF_WALK:
                continue
            if step not in self.config.steps:
                raise UserError(f"grpo: rollout.{key} is {OF_WALK!r}, and this walk has no {step}: give its section")
            rollout[key] = str(self.folder(step))

    def _mistakes_of_queries(self) -> list[str]:
        """What is wrong with files of queries and with rewards, before any model is there to answer them."""
        found: list[str] = []
        asked: list[tuple[str, str, tuple[str, ...], tuple[float, ...]]] = []
        for name in ("rollout", "measure"):
            section: Rewarded | None = getattr(self.config, name)
            if section is not None:
                asked.append((f"{name}.queries", section.queries, section.rewards, section.reward_weights))
        if "grpo" in self.runs and (rollout := self.runs["grpo"].rollout) is not None:
            for key, files in (("queries", rollout.queries), ("held_out", rollout.held_out)):
                asked += [(f"grpo.rollout.{key}", one, rollout.rewards, rollout.reward_weights) for one in files]
        for name, queries, rewards, weights in asked:
            try:
                _check_queries(queries, RewardSettings(rewards=rewards, weights=weights) if rewards else None)
            except UserError as error:
                found.append(f"{name}: {str(error).removeprefix('--input ')}")
        return found


def _check_queries(name: str, rewards: RewardSettings | None) -> None:
    """Raise UserError if the queries cannot be read or lack what a reward needs, or if a reward cannot be computed here."""
    lines = prompt_lines(Path(name))
    if not lines:
        raise UserError(f'{name} has no queries: give JSON lines with "prompt", "messages" or "tokens"')
    used: dict[str, str] = {}
    for number, (where, line) in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object")
        if not row[form := form_of(row, where)]:
            raise UserError(f"{where}: {form} is {row[form]!r}: ask something")
        note_id(used, id_of(row, number, where), Path(name), where)
        if rewards is not None:
            try:
                check_values(rewards, row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    if rewards is not None:
        Rewarder(rewards).close()  # imports its functions

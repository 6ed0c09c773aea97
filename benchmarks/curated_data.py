"""Does a model learn more from curated text than from the same text as it was found? On recipes/curate_demo.yaml.

    python benchmarks/curated_data.py --image curve.png            # makes what is missing, then the table and the picture
    python benchmarks/curated_data.py --image curve.png --figures  # only reads benchmarks/curated_data.json

The raw text is everything that the recipe reads on this machine: Python's standard library with its tests, its
documentation, and all text files that installed packages brought (descriptions, notes, licenses, tables of numbers). Nothing
is added to it. A hash of its text holds out one document in 20; equal texts are on one side. The rest is used as it is, or
curated by the recipe: filters, scores, deduplication, decontamination, and shares of domains. Both are read by the same
model, with the same tokenizer (which learned the raw text), for as many tokens, in two orders each. The losses are those on
the held-out documents as they are, and on those of them that the recipe keeps, by domain and with the recipe's shares.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from launchers.folder.atomic import replaced, write_text

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "curate_demo.yaml"
RESULTS = ROOT / "benchmarks" / "curated_data.json"
HELD_OUT = 20  # one document of so many
VOCABULARY = 2048
TOKENS, PER_STEP, EVERY = 307_200, 1024, 75  # tokens of a run and of a step; steps between validations
SEEDS = (1234, 4321)
KINDS = ("raw", "curated")

TRAINING = """
model:                            # 2.2M parameters, of which a token uses 1.0M
  family: qwen2_moe
  vocab_size: 2048
  hidden_size: 128
  intermediate_size: 384
  moe_intermediate_size: 96
  num_experts: 12
  num_experts_per_tok: 3
  shared_expert_intermediate_size: 96
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  tie_word_embeddings: true
  rope_theta: 10_000
  max_position_embeddings: 2048
optimizer: {learning_rate: 4.0e-3, weight_decay: 0.1}
schedule: {kind: wsd, warmup_tokens: 20_480, decay_tokens: 81_920, min_learning_rate: 2.0e-4}
balance: {scope: global_batch, coefficient: 1.0e-2, z_loss_coefficient: 1.0e-4}
precision: {compute: fp32, master: fp32}
checkpoint: {interval: 300, keep: 1}
launch: {nproc: 1}
"""


def command(*arguments: object) -> None:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", "qwen_moe", *map(str, arguments)], check=True, env=environment, stdout=2)


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    """The demo's recipe with other sections, which writes to ``folder`` / ``name``."""
    path = folder / f"{name}.yaml"
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {"run_dir": str(folder / name)} | changes
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    return path


def divide(folder: Path) -> dict[str, Path]:
    """All documents that the recipe reads, as files of JSON lines: to train on, and held out."""
    parts = {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}
    if not all(path.is_file() for path in parts.values()):
        command("data", "curate", recipe(folder, "all"), "--until", "read")
        lines: dict[str, list[str]] = {name: [] for name in parts}
        for path in sorted((folder / "all" / "1-read" / "kept").glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                digest = hashlib.sha256(json.loads(line)["text"].encode()).digest()
                held_out = int.from_bytes(digest[:8], "big") % HELD_OUT == 0
                lines["held_out" if held_out else "train"].append(line + "\n")
        for name, path in parts.items():
            write_text(path, "".join(lines[name]))
    return parts


def make_data(folder: Path) -> dict[str, Any]:
    """The blends to train on, by kind, and those to validate on."""
    parts = divide(folder)
    raw, tokenizer = folder / "raw", folder / "raw" / "train-tokenizer"
    learned = ("--train-tokenizer", "--vocab-size", VOCABULARY)
    command("data", "prepare", "--input", parts["train"], "--output", raw / "train", *learned)
    command("data", "prepare", "--input", parts["held_out"], "--output", raw / "held_out", "--tokenizer", tokenizer)
    prepare = {"tokenizer": str(tokenizer)}
    command("data", "curate", recipe(folder, "curated", input=[str(parts["train"])], prepare=prepare))
    changes = {"input": [str(parts["held_out"])], "prepare": prepare, "weights": {}}
    command("data", "curate", recipe(folder, "curated-held-out", **changes))
    blend = _blend(folder / "curated")
    validation = {"raw": [{"prefix": str(raw / "held_out")}]}
    shares = {Path(one["prefix"]).name: one["weight"] for one in blend}
    clean = {Path(one["prefix"]).name: one["prefix"] for one in _blend(folder / "curated-held-out")}
    validation["clean"] = [{"prefix": clean[name], "weight": shares[name]} for name in clean if shares.get(name)]
    validation |= {f"clean-{name}": [{"prefix": prefix}] for name, prefix in clean.items()}
    train = {"raw": [{"prefix": str(raw / "train")}], "curated": blend}
    return {"train": train, "validation": validation, "tokenizer": str(tokenizer)}


def _blend(run: Path) -> list[dict[str, Any]]:
    blend = yaml.safe_load((run / "8-prepare" / "blend.yaml").read_text(encoding="utf-8"))
    return list(blend["data"]["train"])


def train(folder: Path, data: dict[str, Any], kind: str, seed: int) -> dict[str, list[tuple[int, float]]]:
    """Train on one kind of data (or go on with it, or find it done). Returns (step, loss) of each validation set."""
    run = folder / f"run-{kind}-{seed}"
    values = yaml.safe_load(TRAINING) | {"run_dir": str(run), "seed": seed}
    values["data"] = {
        "train": data["train"][kind], "validation_sets": data["validation"], "split": "1,0,0",
        "tokenizer": data["tokenizer"], "sequence_length": 128, "seed": seed,
    }  # fmt: skip
    values["training"] = {
        "train_tokens": TOKENS, "micro_batch_size": 8, "global_batch_size": 8, "validation_interval": EVERY,
        "validation_sequences": 64,
    }  # fmt: skip
    path = folder / f"{run.name}.yaml"
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    command("train", path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in data["validation"]:
        key = f"validation_loss/{name}"
        curves[name] = [(record["step"], record[key]) for record in records if key in record]
    return curves


def measure(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    data = make_data(folder)
    runs = {f"{kind} {seed}": train(folder, data, kind, seed) for seed in SEEDS for kind in KINDS}
    facts = json.loads((folder / "curated" / "curate.json").read_text(encoding="utf-8"))
    kept = {one["step"]: {name: one.get(name) for name in ("documents", "by_domain")} for one in facts["steps"]}
    weights = next(one for one in facts["steps"] if one["step"] == "weights")
    return {"kept": kept, "weights": weights.get("domains"), "runs": runs}


def at_end(runs: dict[str, Any], kind: str, name: str) -> list[float]:
    return [runs[f"{kind} {seed}"][name][-1][1] for seed in SEEDS]


def draw(found: dict[str, Any], image: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    titles = {"raw": "held-out text as it was found", "clean": "held-out text that the recipe keeps, with its shares"}
    for axes, (name, title) in zip(both, titles.items(), strict=True):
        for kind, color in zip(KINDS, ("tab:gray", "tab:blue"), strict=True):
            for seed in SEEDS:
                steps, losses = zip(*found["runs"][f"{kind} {seed}"][name], strict=True)
                end = mean(at_end(found["runs"], kind, name))
                label = f"trained on {kind} text ({end:.3f})" if seed == SEEDS[0] else None
                tokens = [step * PER_STEP / 1e6 for step in steps]
                axes.plot(tokens, losses, color=color, marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens (millions)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    both[0].set_ylabel("validation loss (nats per token)")
    with replaced(image) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "curated_benchmark")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    if not args.figures:
        write_text(RESULTS, json.dumps(measure(args.folder.resolve()), indent=1) + "\n")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(found, args.image)
    print("| validated on | trained on raw text | on curated text | difference, by order |\n|---|---|---|---|")
    for name in found["runs"][f"raw {SEEDS[0]}"]:
        raw, curated = (at_end(found["runs"], kind, name) for kind in KINDS)
        differences = ", ".join(f"{b - a:+.3f}" for a, b in zip(raw, curated, strict=True))
        print(f"| {name} | {mean(raw):.3f} | {mean(curated):.3f} | {differences} |")


if __name__ == "__main__":
    main()

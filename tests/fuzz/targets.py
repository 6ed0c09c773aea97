"""What the product reads: each kind of file, the commands that read it, and what may differ in silence, with the reason."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.damage import NEVER_A_VALUE
from tests.fuzz.server import Answer

Result = Callable[[Answer, Path], Any]


def _printed(answer: Answer, folder: Path) -> Any:
    return _plain(answer.out, folder)


def _plain(text: str, folder: Path) -> str:
    """Without what is different at each call: the folder, the hash of its name, seconds."""
    return re.sub(r"\d+\.\d+ s\b|-[0-9a-f]{6}\b", "", text.replace(str(folder), "."))


def _json(*without: str) -> Result:
    def result(answer: Answer, folder: Path) -> Any:
        found = json.loads(answer.out)
        rows = found if isinstance(found, list) else [found]
        for row in rows:
            for name in without:
                row.pop(name, None)
        return json.loads(json.dumps(found).replace(str(folder), "."))

    return result


def _trained(answer: Answer, folder: Path) -> Any:
    """Loss and norm of the last steps, and the validation loss; where the record was damaged, of what is left of it."""
    found: dict[str, Any] = {}
    for line in (folder / "stopped" / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("step") in (5, 6):
            found |= {
                f"{key} {record['step']}": record[key]
                for key in ("loss", "grad_norm", "validation_loss")
                if key in record
            }
    return found


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))
    }


def _exported(answer: Answer, folder: Path) -> Any:
    return hashes(folder / "out", "**/*.safetensors") | hashes(folder / "out", "**/*.json")


def _imported(answer: Answer, folder: Path) -> Any:
    """What was computed from; small files beside the weights are copied as they are."""
    return hashes(folder / "out", "*.distcp") | hashes(folder / "out", "model_config.json")


def _prepared(answer: Answer, folder: Path) -> Any:
    return hashes(folder / "data", "new.bin") | hashes(folder / "data", "new.idx")


def _file(name: str) -> Result:
    return lambda answer, folder: _plain((folder / name).read_text(), folder)


def _ladder(answer: Answer, folder: Path) -> Any:
    return hashes(folder / "new", "*.yaml") | hashes(folder / "new", "*.csv")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A command, what of the world it needs, and what it found. ``refuses``: undamaged, too, it has nothing to do."""

    argv: tuple[str, ...]
    needs: tuple[str, ...]
    result: Result = _printed
    refuses: bool = False


_RUN_DATA = ("data", "recipe.yaml")
READERS = {
    "train": Reader(argv=("train", "stopped.yaml"), needs=("stopped.yaml", "stopped", "data"), result=_trained),
    "info": Reader(argv=("info", "recipe.yaml", "--json"), needs=("recipe.yaml",), result=_json()),
    "info of a run": Reader(argv=("info", "run/checkpoints/step_00000006", "--json"), needs=("run",), result=_json()),
    "info of hf": Reader(argv=("info", "hf", "--json"), needs=("hf",), result=_json()),
    "report": Reader(argv=("report", "run", "--json"), needs=("run",), result=_json()),
    "generate": Reader(
        argv=("generate", "--checkpoint", "run", "--prompt", "router", "--max-new-tokens", "5"), needs=("run",)
    ),
    "to-hf": Reader(argv=("convert", "to-hf", "run", "out"), needs=("run",), result=_exported),
    "to-hf of an import": Reader(argv=("convert", "to-hf", "ckpt", "out"), needs=("ckpt",), result=_exported),
    "from-hf": Reader(argv=("convert", "from-hf", "hf", "out"), needs=("hf",), result=_imported),
    "data info": Reader(argv=("data", "info", "data/corpus", "--json"), needs=("data",), result=_json()),
    "data prepare": Reader(
        argv=("data", "prepare", "--input", "text.jsonl", "--output", "data/new", "--tokenizer", "data/corpus-tokenizer",
              "--workers", "1"),
        needs=("data", "text.jsonl"), result=_prepared,
    ),
    "prepared": Reader(
        argv=("data", "prepare", "--input", "text.jsonl", "--output", "data/corpus", "--train-tokenizer", "--vocab-size",
              "300", "--workers", "1", "--json"),
        needs=("data", "text.jsonl"), result=_json("done", "request", "bin_mtime_ns"),
    ),
    "fit": Reader(
        argv=("scaling", "fit", "runs.csv", "--output", "new", "--samples", "0", "--json"), needs=("runs.csv",),
        result=_json(),
    ),
    "recommend": Reader(
        argv=("scaling", "recommend", "fit", "--n-total", "1e9", "--tokens", "2e10", "--seq-len", "1024", "--json"),
        needs=("fit",), result=_json(),
    ),
    "scaling report": Reader(argv=("scaling", "report", "fit"), needs=("fit",), result=_file("fit/report.md")),
    "ladder": Reader(
        argv=("scaling", "ladder", "large.yaml", "--flops-budget", "1e15", "--output", "new", "--fit", "fit"),
        needs=("large.yaml", "fit"), result=_ladder,
    ),
    "collect": Reader(
        argv=("scaling", "collect", "ladder", "--output", "new.csv", "--json"), needs=("ladder",), result=_file("new.csv")
    ),
    "predict": Reader(
        argv=("scaling", "predict", "ladder/runs/run_000", "--like", "ladder/runs/run_001", "--json"), needs=("ladder",),
        result=_json(),
    ),
    "plan": Reader(
        argv=("plan", "large.yaml", "--gpus", "4", "--gpu", "gpu.yaml", "--network", "network.yaml", "--top", "1", "--json",
              "--precision", "bf16"),
        needs=("large.yaml", "gpu.yaml", "network.yaml"), result=_json("seconds"),
    ),
    "launch": Reader(
        argv=("launch", "launched.yaml", "--site", "site.toml", "--nproc", "1", "--dry-run"),
        needs=("launched.yaml", "site.toml", "launched"),
    ),
    "launch for real": Reader(
        argv=("launch", "launched.yaml", "--site", "site.toml", "--nproc", "1"),
        needs=("launched.yaml", "site.toml", "launched", "data"), result=_file("launched/launch/job.sbatch"),
    ),
    "launch after": Reader(
        argv=("launch", "recipe.yaml", "--site", "site.toml", "--nproc", "1", "--dry-run", "--after-ok", "launched"),
        needs=("recipe.yaml", "site.toml", "launched"),
    ),
    "status": Reader(argv=("status", "launched", "--json"), needs=("launched",), result=_json("updated")),
    "logs": Reader(argv=("logs", "launched"), needs=("launched",)),
    "cancel": Reader(argv=("cancel", "launched"), needs=("launched",), refuses=True),
}  # fmt: skip

# Why another number may come without a word. Kinds that are named in damage.NEVER_A_VALUE may not, whatever stands here.
NOBODY_KNOWS = "the user may write any value that is one; nothing says which was meant"
NO_HASH = "the format has no place for a hash of the content"
DRAWN_ONLY = "a record for people; nothing is computed from it that goes on into a run"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file: where it lies, its form, who reads it, other valid files of its kind.

    ``silent``: why a changed value cannot be told ("" where everything must be). ``hashed``: readers that must say
    something whatever the damage, for the file is covered by a hash. ``allowed``: damage after which the result may
    differ for a reason of its own, by kind.
    """

    paths: tuple[str, ...]
    form: str
    readers: tuple[str, ...]
    silent: str = ""
    hashed: tuple[str, ...] = ()
    allowed: dict[str, str] = field(default_factory=dict)


_LAST = "stopped/checkpoints/step_00000004/"
_ONLY = "run/checkpoints/step_00000006/"
TARGETS: dict[str, Target] = {
    "checkpoint manifest": Target(
        paths=(_LAST + "manifest.json", _ONLY + "manifest.json", "ckpt/manifest.json"), form="json",
        readers=("train", "to-hf", "generate", "to-hf of an import", "info of a run"),
    ),
    "checkpoint metadata": Target(
        paths=(_LAST + ".metadata", _ONLY + ".metadata", "ckpt/.metadata"), form="bytes",
        readers=("train", "to-hf", "generate", "to-hf of an import"),
        hashed=("train", "to-hf", "generate", "to-hf of an import"),
    ),
    "checkpoint tensors": Target(
        paths=(_LAST + "__0_0.distcp", _ONLY + "__0_0.distcp", "ckpt/__0_0.distcp"), form="bytes",
        readers=("train", "to-hf", "generate", "to-hf of an import"),
        hashed=("train", "to-hf", "generate", "to-hf of an import"),
    ),
    "checkpoint train_state": Target(
        paths=(_LAST + "train_state.json", _ONLY + "train_state.json"), form="json", readers=("train", "to-hf"),
        hashed=("train", "to-hf"),
    ),
    "checkpoint model_config": Target(
        paths=(_LAST + "model_config.json", _ONLY + "model_config.json", "ckpt/model_config.json"), form="json",
        readers=("train", "to-hf", "generate", "to-hf of an import", "info of a run"),
        hashed=("train", "to-hf", "generate", "to-hf of an import"),
    ),
    "checkpoint hf_shards": Target(
        paths=("ckpt/hf_shards.json",), form="json", readers=("to-hf of an import",), hashed=("to-hf of an import",),
    ),
    "checkpoint hf": Target(
        paths=("ckpt/hf/config.json", "ckpt/hf/tokenizer.json", "ckpt/hf/tokenizer_config.json"), form="json",
        readers=("to-hf of an import",),
        hashed=("to-hf of an import",),
    ),
    "recipe": Target(
        paths=("recipe.yaml", "stopped.yaml", "large.yaml", "launched.yaml"), form="yaml",
        readers=("info", "train", "plan", "ladder", "launch", "launch for real"), silent=NOBODY_KNOWS,
    ),
    "resolved config": Target(
        paths=("stopped/config.yaml", "ladder/runs/run_000/config.yaml", "ladder/run_000.yaml"), form="yaml",
        readers=("predict", "train", "collect"), silent=NOBODY_KNOWS,
    ),
    "data manifest": Target(paths=("data/corpus.json",), form="json", readers=("train", "data info", "prepared")),
    "data index": Target(
        paths=("data/corpus.idx",), form="bytes", readers=("train", "data info", "prepared"), hashed=("train",),
    ),
    "data tokens": Target(
        paths=("data/corpus.bin",), form="bytes", readers=("train", "data info", "prepared"), hashed=("train",),
    ),
    "data cache": Target(paths=("stopped/data_cache",), form="bytes", readers=("train",)),
    "tokenizer": Target(
        paths=("data/corpus-tokenizer/tokenizer.json", "data/corpus-tokenizer/tokenizer_config.json"), form="json",
        readers=("data prepare", "train"), silent=NOBODY_KNOWS,
    ),
    "text": Target(paths=("text.jsonl",), form="jsonl", readers=("data prepare", "prepared"), silent=NOBODY_KNOWS),
    "hf config": Target(
        paths=("hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json"), form="json",
        readers=("from-hf", "info of hf"), silent=NOBODY_KNOWS,
    ),
    "hf index": Target(paths=("hf/model.safetensors.index.json",), form="json", readers=("from-hf",)),
    "hf weights": Target(
        paths=("hf/model-00001-of-00004.safetensors", "hf/model-00003-of-00004.safetensors"), form="bytes",
        readers=("from-hf",), silent=NO_HASH,
    ),
    "metrics": Target(
        paths=("run/metrics.jsonl", "stopped/metrics.jsonl", "ladder/runs/run_000/metrics.jsonl"),
        form="jsonl",
        readers=("report", "predict", "train", "collect"), silent=DRAWN_ONLY,
    ),
    "metrics of a launched run": Target(
        paths=("launched/metrics.jsonl",), form="jsonl", readers=("status",), silent=DRAWN_ONLY,
        allowed=dict.fromkeys(NEVER_A_VALUE, "status shows the newest line that is a record"),
    ),
    "attempts": Target(paths=("stopped/attempts.jsonl",), form="jsonl", readers=("train",)),
    "run leftovers": Target(
        paths=("stopped/lock", "stopped/progress", "stopped/config.resolved.yaml"), form="text", readers=("train",),
    ),
    "runs table": Target(paths=("runs.csv",), form="csv", readers=("fit",), silent=NOBODY_KNOWS),
    "fit": Target(paths=("fit/fit.json",), form="json", readers=("recommend", "scaling report", "ladder")),
    "fit table": Target(paths=("fit/runs.csv",), form="csv", readers=("scaling report",), silent=DRAWN_ONLY),
    "ladder table": Target(paths=("ladder/ladder.csv",), form="csv", readers=("collect",), silent=NOBODY_KNOWS),
    "site file": Target(
        paths=("site.toml",), form="toml", readers=("launch", "launch for real", "launch after"), silent=NOBODY_KNOWS
    ),
    "hardware": Target(paths=("gpu.yaml", "network.yaml"), form="yaml", readers=("plan",), silent=NOBODY_KNOWS),
    "launch record": Target(
        paths=("launched/launch/launch.json",), form="json",
        readers=("status", "logs", "cancel", "launch after", "launch", "launch for real"), silent=DRAWN_ONLY,
    ),
    "attempt records": Target(
        paths=("launched/launch/attempts/001/decision.json", "launched/launch/attempts/001/plan.json",
               "launched/launch/attempts/001/nodes/n1.json", "launched/launch/excluded_nodes.json"),
        form="json", readers=("status", "logs", "cancel"), silent=DRAWN_ONLY,
    ),
    "rank log": Target(
        paths=("launched/launch/attempts/001/ranks/rank-0000.log",), form="text", readers=("logs",), silent=DRAWN_ONLY
    ),
}  # fmt: skip


def not_finite(value: Any) -> bool:
    """Whether a number in a result is none."""
    if isinstance(value, dict):
        return any(map(not_finite, value.values()))
    if isinstance(value, list):
        return any(map(not_finite, value))
    return isinstance(value, float) and not math.isfinite(value)

"""Writes the mixture-of-experts checkpoint of a dense model, one tensor at a time."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_moe.checkpoint.aside import require_free, written_aside
from qwen_moe.checkpoint.directory import commit, file_entry, files_in
from qwen_moe.checkpoint.finite import check_finite
from qwen_moe.checkpoint.huggingface.config import hf_config
from qwen_moe.checkpoint.huggingface.convert import Weights, open_weights
from qwen_moe.checkpoint.huggingface.directory import CONFIG, copy_files, read_json, side_files
from qwen_moe.checkpoint.huggingface.export import config_bytes, dtype_name, progress_bar
from qwen_moe.checkpoint.huggingface.names import expert_biases, parameters
from qwen_moe.checkpoint.manifest import read_manifest
from qwen_moe.checkpoint.resolve import HF_FOLDER, MODEL_CONFIG, is_ours
from qwen_moe.checkpoint.tensor_store import write_tensors
from qwen_moe.checkpoint.upcycle.layer import Layer
from qwen_moe.checkpoint.upcycle.settings import Plan, UpcycleSettings, make_plan
from qwen_moe.errors import UserError
from qwen_moe.models.flops import ParameterCounts, count_parameters

# What the MoE model's config.json keeps of the dense model's.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
_MLP = ".mlp."


@dataclass(frozen=True)
class Upcycled:
    """What was made, or with ``dry_run`` would be. ``unchanged``: tensors copied bit for bit; ``cut``: made of the dense
    feed-forward; ``new``: routers and gates, which the dense model does not have. ``before`` and ``after``: parameters of
    the models. ``model``: the fields that a recipe's model section needs; a reward model's criteria are its objective's."""

    source: str
    target: str
    dry_run: bool
    plan: Plan
    unchanged: int
    cut: int
    new: int
    bytes: int
    before: ParameterCounts
    after: ParameterCounts
    model: dict[str, Any]
    notes: tuple[str, ...]


class _Tensors:
    """The tensors of the MoE model, each made when it is asked for. Holds the indices of one layer at a time."""

    def __init__(self, weights: Weights, plan: Plan) -> None:
        self._weights, self._plan = weights, plan
        self._layer: tuple[int, Layer] | None = None
        self.biases = expert_biases(plan.moe)
        self.unchanged = frozenset(parameters(plan.moe).keys() & parameters(plan.dense).keys())
        self.dtypes = {name: self._dtype(name) for name in parameters(plan.moe)}

    def _dtype(self, name: str) -> torch.dtype:
        source = self._weights.source
        if name in self.unchanged:
            return source.dtype(name)
        gate, up, down = (f"{_base(name)}{part}_proj.weight" for part in ("gate", "up", "down"))
        if source.dtype(gate) != source.dtype(up):
            raise UserError(
                f"{gate} of {self._weights.directory} is {dtype_name(source.dtype(gate))} but {up} is "
                f"{dtype_name(source.dtype(up))}: experts stack them in one tensor; convert the model to one dtype first"
            )
        return source.dtype(down if name.endswith(("down_proj", "down_proj.weight")) else gate)

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found = {name: (one.shape, self.dtypes[name]) for name, one in parameters(self._plan.moe).items()}
        return found | {name: (shape, torch.float32) for name, shape in self.biases.items()}

    def _read(self, name: str) -> torch.Tensor:
        return check_finite(name, self._weights.source.read(name), str(self._weights.directory))

    def make(self, name: str) -> torch.Tensor:
        if name in self.biases:
            return torch.zeros(self.biases[name])
        if name in self.unchanged:
            return self._read(name)
        base = _base(name)
        layer, what = self._of(int(base.split(".")[2])), name.removeprefix(base)
        makers: dict[str, Callable[[], torch.Tensor]] = {
            "gate.weight": lambda: layer.router().to(self.dtypes[name]),
            "experts.gate_up_proj": lambda: layer.gate_up(self._part(base, "gate"), self._part(base, "up")),
            "experts.down_proj": lambda: layer.down(self._part(base, "down")),
            "shared_expert.gate_proj.weight": lambda: layer.shared_up("gate", self._part(base, "gate")),
            "shared_expert.up_proj.weight": lambda: layer.shared_up("up", self._part(base, "up")),
            "shared_expert.down_proj.weight": lambda: layer.shared_down(self._part(base, "down")),
            "shared_expert_gate.weight": lambda: torch.zeros(1, self._plan.moe.hidden_size, dtype=self.dtypes[name]),
        }
        return makers[what]()

    def _part(self, base: str, part: str) -> torch.Tensor:
        return self._read(f"{base}{part}_proj.weight")

    def _of(self, index: int) -> Layer:
        if self._layer is None or self._layer[0] != index:
            self._layer = index, Layer(self._plan, index)
        return self._layer[1]


def _base(name: str) -> str:
    return name[: name.index(_MLP) + len(_MLP)]


def upcycle(
    source: Path | str,
    target: Path | str,
    settings: UpcycleSettings,
    *,
    dry_run: bool = False,
    progress: bool = False,
) -> Upcycled:
    """Write the mixture of experts that ``settings`` make of the dense model ``source`` as a checkpoint ``target`` (new or
    empty).

    ``source``: a Hugging Face directory, a checkpoint, or a run directory (then its newest valid checkpoint). Tensors keep
    their dtypes. Raises UserError before anything is written if the settings do not fit the model, or the disk is too
    small. A later failure leaves nothing behind. With ``dry_run`` everything is checked and nothing is written.
    """
    source, target = Path(source), Path(target)
    weights = open_weights(source)
    plan = make_plan(weights.config, settings, str(weights.directory))
    # Before a billion experts are given names.
    require_free(target, count_parameters(plan.moe).total * weights.source.dtype("model.embed_tokens.weight").itemsize)
    tensors = _Tensors(weights, plan)
    specs = tensors.specs()
    ours = is_ours(source)
    side = weights.directory / HF_FOLDER if ours else weights.directory
    kept, notes = side_files(side) if side.is_dir() else ([], [])
    total = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in specs.values())
    require_free(target, total + sum((side / name).stat().st_size for name in kept) + (1 << 20))
    if not dry_run:
        with written_aside(target) as partial, progress_bar(total, "upcycling", progress) as bar:

            def produce(name: str) -> torch.Tensor:
                tensor = tensors.make(name)
                bar.update(tensor.nbytes)
                return tensor

            write_tensors(partial, specs, produce)
            (partial / MODEL_CONFIG).write_text(plan.moe.model_dump_json(indent=1), encoding="utf-8")
            _write_side_files(partial / HF_FOLDER, side, kept, plan, tensors)
            entries = {file.as_posix(): file_entry(partial / file) for file in files_in(partial)}
            commit(target, entries, _facts(weights, plan, ours))
    cut = [name for name in specs if ".experts." in name or ".shared_expert." in name]
    return Upcycled(
        source=str(weights.directory),
        target=str(target),
        dry_run=dry_run,
        plan=plan,
        unchanged=len(tensors.unchanged),
        cut=len(cut),
        new=len(parameters(plan.moe)) - len(tensors.unchanged) - len(cut),
        bytes=total,
        before=count_parameters(plan.dense),
        after=count_parameters(plan.moe),
        model=plan.moe.model_dump(mode="json", exclude_defaults=True, exclude={"criteria"}),
        notes=tuple(notes),
    )


def _facts(weights: Weights, plan: Plan, ours: bool) -> dict[str, Any]:
    compute = read_manifest(weights.directory).get("compute_dtype") if ours else None
    facts = {"source": "upcycled", "family": plan.moe.family, "upcycling": asdict(plan.settings)}
    return facts | ({"compute_dtype": compute} if compute else {})


def _write_side_files(folder: Path, side: Path, kept: list[Path], plan: Plan, tensors: _Tensors) -> None:
    """The dense model's tokenizer and other small files, and the MoE model's config.json."""
    copy_files(side, [name for name in kept if name != Path(CONFIG)], folder)
    if Path(CONFIG) not in kept:
        return
    original = read_json(side / CONFIG)
    values = hf_config(plan.moe, dtype=dtype_name(tensors.dtypes["model.embed_tokens.weight"]))
    values |= {key: original[key] for key in _KEPT if original.get(key) is not None}
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(config_bytes(values))

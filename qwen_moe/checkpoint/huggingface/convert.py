"""Converts between Hugging Face directories and our checkpoints, both ways, and loads models from either.

A checkpoint made here holds what a training checkpoint does, except the training state: DCP's files with the weights
under ``model.``, `model_config.json`, `hf/` (config.json, tokenizer and every other small file of the directory, byte
for byte), `hf_shards.json` (how the tensors were laid out in files) and `manifest.json`. Converting it back without
changes gives the same bytes in every file.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launchers.counted import counted
from qwen_moe.checkpoint.aside import require_free, written_aside
from qwen_moe.checkpoint.directory import commit, file_entry, files_in
from qwen_moe.checkpoint.finite import check_cast, check_finite
from qwen_moe.checkpoint.huggingface.config import interpret
from qwen_moe.checkpoint.huggingface.directory import (
    CONFIG,
    ShardLayout,
    copy_files,
    open_shards,
    read_json,
    side_files,
)
from qwen_moe.checkpoint.huggingface.export import (
    ExportRequest,
    check_expert_bias,
    check_source,
    config_bytes,
    dtype_name,
    export,
    export_dtype,
    progress_bar,
    token_ids,
)
from qwen_moe.checkpoint.huggingface.fp8 import Fp8Tensors, split_scales
from qwen_moe.checkpoint.huggingface.names import expert_biases, match, parameters
from qwen_moe.checkpoint.huggingface.safetensors_file import Header, read_into
from qwen_moe.checkpoint.huggingface.sparse import read_sparse
from qwen_moe.checkpoint.manifest import read_manifest
from qwen_moe.checkpoint.resolve import HF_FOLDER, MODEL_CONFIG, is_ours, model_config, resolve_checkpoint
from qwen_moe.checkpoint.tensor_store import (
    CheckpointTensors,
    HuggingFaceTensors,
    ModuleTensors,
    TensorSource,
    write_tensors,
)
from qwen_moe.config import ModelConfig
from qwen_moe.config.writers import writer
from qwen_moe.errors import UserError
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import keep_statistics_dtypes

HF_SHARDS = "hf_shards.json"


@dataclass(frozen=True)
class Conversion:
    """What was converted. ``dtypes``: how many of the ``tensors`` have each. ``notes`` name defaults taken and keys and
    files not used, one per sentence."""

    source: str
    target: str
    family: str
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    files: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _OpenDirectory:
    config: ModelConfig
    headers: dict[Path, Header]
    tensors: HuggingFaceTensors
    notes: tuple[str, ...]


def _check_tied_head(headers: dict[Path, Header], hf_dir: Path) -> None:
    found = {}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        path, header = next((path, header) for path, header in headers.items() if name in header.entries)
        entry = header.entries[name]
        found[name] = torch.empty(entry.shape, dtype=entry.dtype)
        with path.open("rb", buffering=0) as file:
            read_into(file, header, name, found[name])
    head, embedding = found.values()
    if head.dtype != embedding.dtype or not torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
        raise UserError(
            f"{hf_dir} has tie_word_embeddings true, but its lm_head.weight differs from model.embed_tokens.weight: "
            "set tie_word_embeddings to false in config.json, or remove lm_head.weight"
        )


def _open_directory(hf_dir: Path) -> _OpenDirectory:
    """Read and check everything in a Hugging Face directory except the data of its tensors. Raises UserError."""
    if not hf_dir.exists():
        raise UserError(
            f"{hf_dir} does not exist: give a local Hugging Face model directory or a checkpoint{writer(hf_dir)}"
        )
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir} is not a directory: give a local Hugging Face model directory or a checkpoint")
    values = read_json(hf_dir / CONFIG)
    interpretation = interpret(values, str(hf_dir / CONFIG))
    config = interpretation.config
    headers = open_shards(hf_dir)
    shapes = {name: entry.shape for header in headers.values() for name, entry in header.entries.items()}
    block = (values.get("quantization_config") or {}).get("weight_block_size")
    shapes = split_scales(shapes, headers, block, str(hf_dir))
    found = match(config, shapes, str(hf_dir))
    notes = list(interpretation.notes)
    if read_sparse(hf_dir, config) is not None:
        notes.append("its budgets of sparse prefill are kept")
    if found.tied_head:
        _check_tied_head(headers, hf_dir)
    if found.ignored:
        notes.append(
            f"{counted(len(found.ignored), 'buffer that is', 'buffers that are')} computed again are not kept: "
            f"{found.ignored[0]}, ..."
        )
    ours = {name: parameter.shape for name, parameter in parameters(config).items()}
    tensors = HuggingFaceTensors(headers, found.pieces, ours)
    if block is not None:
        wide = str(values.get("dtype") or values.get("torch_dtype"))
        dtype = torch.float32 if wide == "float32" else torch.bfloat16
        tensors = Fp8Tensors(headers, found.pieces, ours, (block[0], block[1]), dtype)
    return _OpenDirectory(config, headers, tensors, tuple(notes))


def _bytes(source: TensorSource, shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(source.dtype(name).itemsize * int(torch.Size(shape).numel()) for name, shape in shapes.items())


def _count_dtypes(dtypes: list[torch.dtype]) -> dict[str, int]:
    return {dtype_name(dtype): dtypes.count(dtype) for dtype in dict.fromkeys(dtypes)}


def convert_from_hf(hf_dir: Path | str, checkpoint_dir: Path | str, *, progress: bool = False) -> Conversion:
    """Write the Hugging Face directory ``hf_dir`` as a checkpoint at ``checkpoint_dir`` (new or empty).

    Tensors keep their dtypes. Raises UserError before anything is written if config.json is not supported, a tensor is
    missing, left over or of another shape, or the disk is too small. A later failure leaves nothing behind.
    """
    hf_dir, checkpoint_dir = Path(hf_dir), Path(checkpoint_dir)
    if is_ours(hf_dir):
        raise UserError(f"{hf_dir} is a checkpoint, not a Hugging Face directory: convert it with to-hf")
    opened = _open_directory(hf_dir)
    tensors = opened.tensors
    kept, left = side_files(hf_dir)
    total = _bytes(tensors, tensors.shapes())
    biases = expert_biases(opened.config)
    specs = {name: (shape, tensors.dtype(name)) for name, shape in tensors.shapes().items()}
    specs |= {name: (shape, torch.float32) for name, shape in biases.items()}
    require_free(checkpoint_dir, total + sum((hf_dir / name).stat().st_size for name in kept) + (1 << 20))
    with written_aside(checkpoint_dir) as partial, progress_bar(total, "converting", progress) as bar:

        def produce(name: str) -> torch.Tensor:
            if name in biases:
                return torch.zeros(biases[name])
            tensor = check_finite(name, tensors.read(name), str(hf_dir))
            bar.update(tensor.nbytes)
            return tensor

        write_tensors(partial, specs, produce)
        (partial / MODEL_CONFIG).write_text(opened.config.model_dump_json(indent=1), encoding="utf-8")
        (partial / HF_SHARDS).write_text(ShardLayout.of(hf_dir, opened.headers).dumps(), encoding="utf-8")
        copy_files(hf_dir, kept, partial / HF_FOLDER)
        entries = {file.as_posix(): file_entry(partial / file) for file in files_in(partial)}
        commit(checkpoint_dir, entries, {"source": "huggingface", "family": opened.config.family})
    return Conversion(
        source=str(hf_dir),
        target=str(checkpoint_dir),
        family=opened.config.family,
        tensors=len(tensors.shapes()),
        bytes=total,
        dtypes=_count_dtypes([tensors.dtype(name) for name in tensors.shapes()]),
        files=len(entries),
        notes=opened.notes + tuple(left),
    )


def stored_dtype(checkpoint: Path, stored: torch.dtype) -> torch.dtype:
    """The dtype in which weights stored as ``stored`` are used: bf16 for fp32 master weights of a bf16 run."""
    compute = read_manifest(checkpoint).get("compute_dtype")
    return torch.bfloat16 if compute == "bf16" and stored == torch.float32 else stored


def convert_to_hf(
    checkpoint: Path | str,
    hf_dir: Path | str,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    drop_expert_bias: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write the weights of a checkpoint as a Hugging Face directory ``hf_dir`` (new or empty).

    ``checkpoint`` is a checkpoint, or a run directory or its `checkpoints/` (then the newest valid checkpoint is used).
    ``dtype`` None keeps every tensor's dtype, except that fp32 master weights of a bf16 run are exported as bf16; "fp8"
    exports linear layers in FP8 blocks (qwen_moe/checkpoint/huggingface/fp8.py) and the rest in bf16. ``max_shard_size``
    None gives the same files as the original, or files of at most 5 GB. Raises UserError.
    """
    path = resolve_checkpoint(Path(checkpoint))
    hf_dir = Path(hf_dir)
    fp8 = dtype == "fp8"
    wanted = export_dtype("bf16" if fp8 else dtype)
    config = model_config(path)
    source = CheckpointTensors(path)
    check_source(source, config, str(path))
    notes = check_expert_bias(source, config, drop_expert_bias)
    names = parameters(config)
    dtypes = {name: wanted or stored_dtype(path, source.dtype(name)) for name in names}
    side = path / HF_FOLDER
    found, left = side_files(side) if side.is_dir() else ([], [])
    kept = [name for name in found if name != Path(CONFIG)]
    shards = export(
        ExportRequest(
            source=source,
            config=config,
            dtypes=dtypes,
            fp8=fp8,
            max_shard_size=max_shard_size,
            layout=ShardLayout.read(path / HF_SHARDS) if (path / HF_SHARDS).is_file() else None,
            original_config=(side / CONFIG).read_bytes() if Path(CONFIG) in found else None,
            keeps_dtypes=(path / HF_SHARDS).is_file() and all(dtypes[name] == source.dtype(name) for name in names),
            token_ids=token_ids(side),
            write_side_files=lambda partial: copy_files(side, kept, partial),
            progress=progress,
        ),
        hf_dir,
    )
    written = [entry.dtype for header in shards.files.values() for entry in header.entries.values()]
    return Conversion(
        source=str(path),
        target=str(hf_dir),
        family=config.family,
        tensors=len(written),
        bytes=shards.data_bytes,
        dtypes=_count_dtypes(written),
        files=len(files_in(hf_dir)),
        notes=notes + tuple(left) + (_score_notes(hf_dir) if config.criteria else ()),
    )


def _score_notes(hf_dir: Path) -> tuple[str, ...]:
    """Where transformers reads scores elsewhere than we do: it looks for the last token that is not padding."""
    values = read_json(hf_dir / CONFIG)
    pad = values.get("pad_token_id")
    if pad is None:
        return ("config.json has no pad_token_id, so transformers scores one conversation at a time",)
    if pad in _answer_ends(hf_dir, values):
        return (
            f"pad_token_id {pad} of config.json also ends answers, so transformers reads scores at the token before the "
            "end: give it a pad_token_id of its own",
        )
    return ()


def _answer_ends(hf_dir: Path, values: dict[str, Any]) -> list[Any]:
    """What the tokenizer's chat template ends an answer with; without a template, all tokens that end generation."""
    from qwen_moe.data.chat import Chat

    with contextlib.suppress(UserError):
        return [Chat(hf_dir).end]
    end = values.get("eos_token_id")
    return end if isinstance(end, list) else [end]


@dataclass(frozen=True)
class Weights:
    """The weights of one of our checkpoints or of a Hugging Face directory, opened and checked but not read. ``dtype``: as
    stored, or the compute dtype of a training checkpoint."""

    directory: Path
    config: ModelConfig
    source: TensorSource
    dtype: torch.dtype


def open_weights(directory: Path) -> Weights:
    """``directory``: a Hugging Face directory, one of our checkpoints, or a run directory (then its newest valid
    checkpoint). Raises UserError like the converters."""
    if not is_ours(directory):
        opened = _open_directory(directory)
        return Weights(directory, opened.config, opened.tensors, opened.tensors.dtype("model.embed_tokens.weight"))
    path = resolve_checkpoint(directory)
    config, source = model_config(path), CheckpointTensors(path)
    check_source(source, config, str(path))
    return Weights(path, config, source, stored_dtype(path, source.dtype("model.embed_tokens.weight")))


def read_model(weights: Weights, dtype: str | torch.dtype | None, device: str | torch.device) -> DecoderLM:
    """A model in eval mode. ``dtype`` None: see `Weights`. Raises UserError for values that are not finite."""
    with torch.device("meta"):
        model = DecoderLM(weights.config)
    model = model.to(export_dtype(dtype) or weights.dtype).to_empty(device=device)
    keep_statistics_dtypes(model)
    available = weights.source.shapes()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in available:
                stored = check_finite(name, weights.source.read(name), str(weights.directory))
                check_cast(name, stored, tensor.copy_(stored))
            else:
                tensor.zero_()  # only expert biases may be absent: every parameter was checked
    return model.eval()


def from_pretrained(
    directory: Path | str, dtype: str | torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> DecoderLM:
    """A model in eval mode from a Hugging Face directory or one of our checkpoints (or a run directory).

    ``dtype`` None keeps the stored dtype (the compute dtype for a training checkpoint). Raises UserError like the
    converters.
    """
    return read_model(open_weights(Path(directory)), dtype, device)


def save_pretrained(
    model: DecoderLM,
    hf_dir: Path | str,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    tokenizer: Any = None,
    original_config: dict[str, Any] | None = None,
    drop_expert_bias: bool = False,
) -> None:
    """Write a model that is not sharded as a Hugging Face directory (new or empty).

    ``tokenizer``: anything with ``save_pretrained``. ``original_config``: a config.json whose keys are kept if they are
    still correct. Raises UserError like `convert_to_hf`.
    """
    source = ModuleTensors(model)
    wanted = export_dtype(dtype)
    check_source(source, model.config, "the model")
    check_expert_bias(source, model.config, drop_expert_bias)

    def write_side_files(partial: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))

    found = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    export(
        ExportRequest(
            source=source,
            config=model.config,
            dtypes={name: wanted or source.dtype(name) for name in parameters(model.config)},
            max_shard_size=max_shard_size,
            original_config=None if original_config is None else config_bytes(original_config),
            token_ids={key: value for key, value in found.items() if value is not None},
            write_side_files=write_side_files,
        ),
        Path(hf_dir),
    )

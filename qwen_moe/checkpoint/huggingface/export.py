"""Writes a whole Hugging Face directory from any source of our tensors, and checks first that it can hold them."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from launchers.counted import counted
from qwen_moe.checkpoint.aside import require_free, written_aside
from qwen_moe.checkpoint.directory import files_in
from qwen_moe.checkpoint.huggingface.config import hf_config
from qwen_moe.checkpoint.huggingface.directory import (
    CONFIG,
    DEFAULT_MAX_SHARD_BYTES,
    ShardLayout,
    Shards,
    parse_size,
    plan_shards,
    read_json,
    same_shards,
    write_shards,
)
from qwen_moe.checkpoint.huggingface.fp8 import fp8_part, fp8_pieces
from qwen_moe.checkpoint.huggingface.names import Piece, expert_biases, hf_pieces, parameters
from qwen_moe.checkpoint.resolve import MODEL_CONFIG
from qwen_moe.checkpoint.tensor_store import TensorSource
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.progress import style

DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def export_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPE_NAMES:
            raise UserError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPE_NAMES)}")
        return DTYPE_NAMES[dtype]
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def config_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def progress_bar(total: int, what: str, show: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show, **style())


def token_ids(directory: Path) -> dict[str, Any]:
    """bos, eos and pad token ids read from a tokenizer's files, for a config.json that is made without an original."""
    if not (directory / "tokenizer_config.json").is_file() or not (directory / "tokenizer.json").is_file():
        return {}
    named = read_json(directory / "tokenizer_config.json")
    tokenizer = read_json(directory / "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids[token["content"]] = token.get("id")
    found = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = named.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and isinstance(ids.get(content), int):
            found[key + "_id"] = ids[content]
    return found


def _object(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {CONFIG} kept with the weights is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"the {CONFIG} kept with the weights is a {type(values).__name__}, expected a JSON object")
    return values


def check_source(source: TensorSource, config: ModelConfig, where: str) -> None:
    """Raises UserError unless ``source`` has every parameter with its shape, and nothing else but known buffers."""
    wanted: dict[str, tuple[int, ...]] = {name: parameter.shape for name, parameter in parameters(config).items()}
    found = source.shapes()
    known = wanted | expert_biases(config)
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not known to {config.family}" for name in found if name not in known]
    wrong += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in known.items()
        if name in found and tuple(found[name]) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the weights of {where} do not match its {MODEL_CONFIG}: {'; '.join(wrong[:3])}{more}")


def check_expert_bias(source: TensorSource, config: ModelConfig, drop: bool) -> tuple[str, ...]:
    """Notes on the nonzero expert biases that the export drops. Raises UserError if there are any and not ``drop``."""
    found = source.shapes()
    nonzero = [name for name in expert_biases(config) if name in found and bool(source.read(name).any())]
    if not nonzero:
        return ()
    if not drop:
        raise UserError(
            f"{counted(len(nonzero), 'layer has', 'layers have')} a nonzero expert_bias ({nonzero[0]}, ...), which "
            "Hugging Face's format cannot "
            "hold: the exported model would route differently. Pass --drop-expert-bias (drop_expert_bias=True) to "
            "export without it"
        )
    return (f"the nonzero expert_bias of {counted(len(nonzero), 'layer')} was dropped: routing differs from training",)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The weights to export and the form that they take in the Hugging Face directory.

    ``dtypes``: the dtype that each parameter is written in; with ``fp8``, linear weights are FP8 blocks instead.
    ``max_shard_size`` None: keep the files of ``layout``, which the weights came in, or write files of at most
    `DEFAULT_MAX_SHARD_BYTES` where there is no layout.
    ``original_config``: the config.json that came with the weights, written unchanged if it still describes the model;
    ``keeps_dtypes`` says that ``dtypes`` are those it was written for. ``token_ids``: bos, eos and pad ids for a
    config.json that is made without an original.
    """

    source: TensorSource
    config: ModelConfig
    dtypes: dict[str, torch.dtype]
    fp8: bool = False
    max_shard_size: int | str | None = None
    layout: ShardLayout | None = None
    original_config: bytes | None = None
    keeps_dtypes: bool = False
    token_ids: dict[str, Any] = field(default_factory=dict)
    write_side_files: Callable[[Path], None]
    progress: bool = False


def export(request: ExportRequest, hf_dir: Path) -> Shards:
    """Write a whole Hugging Face directory ``hf_dir``, or nothing. Raises UserError."""
    pieces, shards, quantization = _plan_tensors(request)
    config_json = _config_json(request, quantization)
    require_free(hf_dir, shards.data_bytes + (1 << 20))
    with (
        written_aside(hf_dir) as partial,
        progress_bar(shards.data_bytes, "exporting", request.progress) as bar,
    ):
        write_shards(partial, shards, request.source, pieces, bar.update, fp8_part)
        request.write_side_files(partial)
        (partial / CONFIG).write_bytes(config_json)
        for file in files_in(partial):
            with (partial / file).open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(partial, hf_dir)
    return shards


def _plan_tensors(request: ExportRequest) -> tuple[dict[str, Piece], Shards, dict[str, Any]]:
    """(tensors by Hugging Face name, the files that hold them, config.json's ``quantization_config`` if any)."""
    ordered = [piece for parameter in parameters(request.config).values() for piece in parameter.pieces]
    pieces, shards = hf_pieces(request.config), None
    quantization: dict[str, Any] = {}
    if request.fp8:
        ordered, quantization = fp8_pieces(ordered)
        pieces = {piece.hf_name: piece for piece in ordered}
    elif request.layout is not None and request.max_shard_size is None:
        shards = same_shards(request.layout, pieces, request.dtypes)
    if shards is None:
        limit = request.max_shard_size
        max_bytes = DEFAULT_MAX_SHARD_BYTES if limit is None else parse_size(limit)
        shards = plan_shards(ordered, request.dtypes, max_bytes)
    return pieces, shards, quantization


def _config_json(request: ExportRequest, quantization: dict[str, Any]) -> bytes:
    original = request.original_config
    old = _object(original) if original is not None else None
    main = dtype_name(request.dtypes["model.embed_tokens.weight"])
    values = hf_config(request.config, old, None if old is not None and request.keeps_dtypes else main)
    if old is None:
        values |= request.token_ids
    elif request.config.criteria and values["architectures"] != old.get("architectures"):
        # A reward model that began as a language model: transformers finds an answer's end by the padding after it.
        values = {key: value for key, value in request.token_ids.items() if key == "pad_token_id"} | values
    # An original's entry describes FP8 weights, which were dequantized when they were read.
    if values.get("quantization_config") is not None:
        del values["quantization_config"]
    if quantization:
        values["quantization_config"] = quantization
    return original if original is not None and values == old else config_bytes(values)

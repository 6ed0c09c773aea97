"""Writes a whole Hugging Face directory from any source of our tensors, after checking that the format can hold them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

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
from qwen_moe.checkpoint.huggingface.names import expert_biases, hf_pieces, parameters
from qwen_moe.checkpoint.resolve import MODEL_CONFIG
from qwen_moe.checkpoint.tensor_store import TensorSource
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError

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
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not show)


def token_ids(directory: Path) -> dict[str, Any]:
    """bos, eos and pad token ids from a tokenizer's files, for a new config.json."""
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
    """Raise UserError unless ``source`` has every parameter in its shape, and nothing else except known buffers."""
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
    found = source.shapes()
    nonzero = [name for name in expert_biases(config) if name in found and bool(source.read(name).any())]
    if not nonzero:
        return ()
    if not drop:
        raise UserError(
            f"{len(nonzero)} layers have a nonzero expert_bias ({nonzero[0]}, ...), which Hugging Face's format cannot "
            "hold: the exported model would route differently. Pass --drop-expert-bias (drop_expert_bias=True) to "
            "export without it"
        )
    return (f"the nonzero expert_bias of {len(nonzero)} layers was dropped: routing differs from training",)


def export(
    source: TensorSource,
    config: ModelConfig,
    hf_dir: Path,
    *,
    dtypes: dict[str, torch.dtype],
    max_shard_size: int | str | None,
    layout: ShardLayout | None,
    original: bytes | None,
    original_dtypes: bool,
    write_side_files: Callable[[Path], None],
    tokens: dict[str, Any],
    progress: bool,
    fp8: bool = False,
) -> Shards:
    """Write a whole Hugging Face directory. ``dtypes`` are the exported dtypes of parameters; ``fp8`` overrides those of
    linear layers."""
    pieces = hf_pieces(config)
    ordered = [piece for parameter in parameters(config).values() for piece in parameter.pieces]
    quantisation: dict[str, Any] = {}
    if fp8:
        ordered, quantisation = fp8_pieces(ordered)
        pieces, layout = {piece.hf_name: piece for piece in ordered}, None
    shards = same_shards(layout, pieces, dtypes) if layout is not None and max_shard_size is None else None
    if shards is None:
        limit = DEFAULT_MAX_SHARD_BYTES if max_shard_size is None else parse_size(max_shard_size)
        shards = plan_shards(ordered, dtypes, limit)
    old = _object(original) if original is not None else None
    main = dtypes["model.embed_tokens.weight"]
    values = hf_config(config, old, None if old is not None and original_dtypes else dtype_name(main))
    if old is None:
        values |= tokens
    values.pop("quantization_config", None)  # the original's, but its weights were dequantized
    if fp8:
        values["quantization_config"] = quantisation
    require_free(hf_dir, shards.data_bytes + (1 << 20))
    with written_aside(hf_dir) as partial, progress_bar(shards.data_bytes, "exporting", progress) as bar:
        write_shards(partial, shards, source, pieces, bar.update, fp8_part)
        write_side_files(partial)
        (partial / CONFIG).write_bytes(original if original is not None and values == old else config_bytes(values))
        for file in files_in(partial):
            with (partial / file).open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(partial, hf_dir)
    return shards

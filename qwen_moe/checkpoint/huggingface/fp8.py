"""Hugging Face's block-quantized FP8: matrices in E4M3 with a float32 `weight_scale_inv` for each 128 x 128 block.

This is the format of the published Qwen3 and DeepSeek-V3 FP8 directories (`quantization_config` with quant_method fp8, read
by transformers' FineGrainedFP8). Scales written here are powers of two. So values are exact in bfloat16, reading back and
writing again changes no value, and values equal those that the blockwise recipe trains with.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from parallel.kernels.formats import E4M3, quantize_blocks
from qwen_moe.checkpoint.huggingface.names import Piece, Shape
from qwen_moe.checkpoint.huggingface.safetensors_file import Header, read_into
from qwen_moe.checkpoint.tensor_store import HuggingFaceTensors
from qwen_moe.errors import UserError

BLOCK = 128
SCALE = "_scale_inv"


def _module(hf_name: str) -> str:
    """The module that transformers replaces as a unit: all experts of a layer, or a linear layer."""
    return re.sub(r"\.experts\..*", ".experts", hf_name.removesuffix(".weight"))


def fp8_pieces(pieces: Sequence[Piece]) -> tuple[list[Piece], dict[str, Any]]:
    """``pieces`` with FP8 matrices and their scales in place of linear layers, and the `quantization_config` that says so.

    Linear layers that do not consist of whole blocks stay unchanged and are named there, as are router, shared expert's gate
    and head, because transformers infers the block size from the scales' shape. Raises UserError if no linear layer consists
    of whole blocks.
    """
    linears = [piece for piece in pieces if piece.kind == "linear"]
    kept = {_module(piece.hf_name) for piece in linears if any(size % BLOCK for size in piece.shape)}
    names = {piece.hf_name for piece in linears}
    found: list[Piece] = []
    for piece in pieces:
        if piece.hf_name in names and _module(piece.hf_name) not in kept:
            grid = tuple(size // BLOCK for size in piece.shape)
            found.append(replace(piece, holds="fp8"))
            found.append(replace(piece, hf_name=piece.hf_name + SCALE, shape=grid, holds="scale"))
        else:
            found.append(piece)
    if len(found) == len(pieces):
        raise UserError(f"--dtype fp8: no linear layer of this model has sizes that are multiples of {BLOCK}: use bf16")
    gates = {_module(piece.hf_name) for piece in pieces if piece.kind == "gate"}
    head = "score" if any(piece.hf_name == "score.weight" for piece in pieces) else "lm_head"
    return found, {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted({head} | kept | gates),
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def fp8_part(piece: Piece, values: torch.Tensor) -> torch.Tensor:
    """The content of an FP8 piece or a scale piece for the matrix ``values``."""
    quantized = quantize_blocks(values, E4M3, (BLOCK, BLOCK), e8m0=False)
    return quantized.data if piece.holds == "fp8" else quantized.inverse


def check_quantization(settings: dict[str, Any], where: str) -> None:
    """Raise UserError unless `quantization_config` describes the block format above."""
    method, block = settings.get("quant_method", "unknown"), settings.get("weight_block_size")
    blocks = isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    if method != "fp8" or not blocks or settings.get("scale_fmt", "float") != "float":
        raise UserError(
            f"{where}: the weights are quantized ({method}), but only fp8 with a weight_block_size of two sizes and float "
            "scales is supported: use the original model"
        )


def split_scales(
    shapes: Mapping[str, Shape], headers: Mapping[Path, Header], block: Any, where: str
) -> dict[str, Shape]:
    """``shapes`` without the scales of FP8 matrices. Raises UserError if a matrix and its scales do not match, or if there
    are FP8 matrices but config.json does not mention them."""
    dtypes = {name: entry.dtype for header in headers.values() for name, entry in header.entries.items()}
    quantized = [name for name, dtype in dtypes.items() if dtype == E4M3]
    if block is None:
        if quantized:
            raise UserError(
                f"tensor {quantized[0]} of {where} has dtype F8_E4M3, but config.json has no quantization_config: "
                "quantized weights need it, download it again"
            )
        return dict(shapes)
    for name in quantized:
        wanted = tuple(-(-size // part) for size, part in zip(shapes[name], block)) if len(shapes[name]) == 2 else None
        if wanted is None or shapes.get(name + SCALE) != wanted:
            raise UserError(
                f"tensor {name} of {where} is FP8 {list(shapes[name])}, but its {SCALE.removeprefix('_')} is "
                f"{shapes.get(name + SCALE)}, expected {wanted} for blocks of {list(block)}"
            )
    return {
        name: shape for name, shape in shapes.items() if name.removesuffix(SCALE) not in quantized or name in quantized
    }


class Fp8Tensors(HuggingFaceTensors):
    """Parameters of a directory with FP8 matrices, which are dequantized to ``dtype`` when read."""

    def __init__(
        self,
        headers: Mapping[Path, Header],
        pieces: Mapping[str, tuple[Piece, ...]],
        shapes: Mapping[str, Shape],
        block: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self._block, self._dtype = block, dtype
        super().__init__(headers, pieces, shapes)

    def _entry_dtype(self, hf_name: str) -> torch.dtype:
        dtype = super()._entry_dtype(hf_name)
        return self._dtype if dtype == E4M3 else dtype

    def _read_piece(self, file: BinaryIO, header: Header, hf_name: str, out: torch.Tensor) -> None:
        entry = header.entries[hf_name]
        if entry.dtype != E4M3:
            super()._read_piece(file, header, hf_name, out)
            return
        data = torch.empty(entry.shape, dtype=E4M3)
        read_into(file, header, hf_name, data)
        path, other = self._found[hf_name + SCALE]
        scale_entry = other.entries[hf_name + SCALE]
        scales = torch.empty(scale_entry.shape, dtype=scale_entry.dtype)
        with path.open("rb", buffering=0) as beside:
            read_into(beside, other, hf_name + SCALE, scales)
        rows, columns = entry.shape
        factors = scales.float().repeat_interleave(self._block[0], 0)[:rows]
        factors = factors.repeat_interleave(self._block[1], 1)[:, :columns]
        out.copy_((data.float() * factors).to(out.dtype))

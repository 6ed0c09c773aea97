"""Sparse prefill as models for a million tokens are published with it: a budget for each head of each layer.

Budgets are in `sparse_attention_config` inside config.json's `dual_chunk_attention_config`, or in the file
sparse_attention_config.json beside it (Qwen2.5-1M), which wins, as in vLLM. They are a list with an entry for each layer,
which maps the number of each head, a string, to [kind, columns, diagonals, score of the search]. Conversion keeps both: the
file is one of those beside the weights, and the key is a part of config.json.
"""

from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.checkpoint.huggingface.directory import CONFIG, read_json
from qwen_moe.checkpoint.huggingface.dual_chunk import KEY
from qwen_moe.checkpoint.resolve import side_folder
from qwen_moe.config import ModelConfig
from qwen_moe.documents import json_value, read_text
from qwen_moe.errors import UserError
from qwen_moe.models.attention.sparse import SparseSettings
from qwen_moe.models.attention.vertical_slash import FIRST_COLUMNS, LAST_DIAGONALS, Budget

FILE = "sparse_attention_config.json"
_INSIDE = "sparse_attention_config"
_KIND = "vertical_and_slash"


def read_sparse(directory: Path, config: ModelConfig) -> SparseSettings | None:
    """The published settings of the model ``config`` in ``directory``, a Hugging Face directory or a checkpoint, or None if
    it has none. They keep the published budgets whatever share that is; give them a ``kept_share`` to raise them. Raises
    UserError for settings of another model."""
    folder = side_folder(directory)
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    chunks = values.get(KEY)
    inside: dict[str, Any] = chunks if isinstance(chunks, dict) else {}
    if (folder / FILE).is_file():
        where = str(folder / FILE)
        budgets = json_value(read_text(folder / FILE, "file", "the file of the model's publisher"), where)
    else:
        where = f"{folder / CONFIG}: {KEY}.{_INSIDE}"
        budgets = inside.get(_INSIDE)
    if not budgets:
        return None
    given = {
        "threshold": _size(inside, "sparse_attention_threshold", folder),
        "choosing": _size(inside, "sparse_attention_last_q", folder),
    }
    return SparseSettings(
        kept_share=None,
        budgets=_budgets(budgets, config, where),
        **{name: value for name, value in given.items() if value is not None},
    )


def _size(inside: dict[str, Any], key: str, folder: Path) -> int | None:
    value = inside.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{folder / CONFIG}: {KEY}.{key} is {value!r}, expected a positive whole number")
    return value


def _budgets(layers: Any, config: ModelConfig, where: str) -> tuple[tuple[Budget, ...], ...]:
    count, heads = config.num_hidden_layers, config.num_attention_heads
    if not isinstance(layers, list) or len(layers) != count:
        found = f"has {counted(len(layers), 'layer')}" if isinstance(layers, list) else f"is a {type(layers).__name__}"
        raise UserError(
            f"{where} {found}, expected a list of {counted(count, 'layer')}: it belongs to another model; remove it "
            "to choose budgets "
            "by the share of attention that they keep"
        )
    names = {str(head) for head in range(heads)}
    for number, layer in enumerate(layers):
        if not isinstance(layer, dict) or layer.keys() != names:
            found = counted(len(layer), "entry") if isinstance(layer, dict) else f"a {type(layer).__name__}"
            raise UserError(
                f"{where} has {found} for layer {number}, expected one for each of {counted(heads, 'head')}, '0' to "
                f"'{heads - 1}': "
                "it belongs to another model; remove it to choose budgets by the share of attention that they keep"
            )
    return tuple(
        tuple(_budget(layer[str(head)], f"{where}: layer {number}, head {head}") for head in range(heads))
        for number, layer in enumerate(layers)
    )


def _budget(entry: Any, where: str) -> Budget:
    whole = isinstance(entry, list) and len(entry) == 4 and all(type(size) is int and size >= 0 for size in entry[1:3])
    if not whole or entry[0] != _KIND:
        raise UserError(
            f"{where} is {str(entry)[:100]}, expected [{_KIND!r}, columns, diagonals, score]: only this kind is supported"
        )
    vertical, slash = entry[1:3]
    if vertical == FIRST_COLUMNS:  # vLLM gives such a head 100 columns more than those that are always kept
        vertical += 100
    return Budget(max(vertical, FIRST_COLUMNS), max(slash, LAST_DIAGONALS))

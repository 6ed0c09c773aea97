"""Published budgets of sparse prefill: inside config.json and in a file beside it, both ways, and of another model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained
from qwen_moe.checkpoint.huggingface.sparse import read_sparse
from qwen_moe.errors import UserError
from qwen_moe.models.attention.vertical_slash import Budget
from tests.checkpoint.huggingface.directories import by_hand, files_of
from tests.models.hf_reference import draw_weights
from tests.small import small_model

CONFIG = small_model(dual_chunk={"chunk_size": 64, "local_size": 8})
LAYERS: list[dict[str, list[Any]]] = [
    {str(head): ["vertical_and_slash", 500 + head, 700 + layer, 0.9] for head in range(4)} for layer in range(2)
]
LAYERS[1]["2"] = ["vertical_and_slash", 30, 50, 1.0]


def directory(folder: Path, inside: dict[str, Any] | None = None, beside: Any = None) -> Path:
    """A Hugging Face directory with these keys inside dual_chunk_attention_config, and this file beside config.json."""
    by_hand(folder, draw_weights(CONFIG, 1, torch.float32), torch.float32, 2)
    config = json.loads((folder / "config.json").read_text())
    config["dual_chunk_attention_config"] = {"chunk_size": 64, "local_size": 8} | (inside or {})
    (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "sparse_attention_config.json").write_text(json.dumps(beside))
    return folder


@pytest.mark.parametrize("where", ["inside", "beside", "both"])
def test_they_are_read_and_kept_byte_for_byte(tmp_path: Path, where: str) -> None:
    other = [{head: ["vertical_and_slash", 1, 1, 0.0] for head in layer} for layer in LAYERS]
    inside = {"inside": {"sparse_attention_config": LAYERS}, "beside": {}, "both": {"sparse_attention_config": other}}[
        where
    ]
    given = inside | {"sparse_attention_threshold": 99, "sparse_attention_last_q": 7, "sparse_attention_enabled": True}
    folder = directory(tmp_path / "hf", given, None if where == "inside" else LAYERS)
    result = convert_from_hf(folder, tmp_path / "checkpoint")
    assert "its budgets of sparse prefill are kept" in result.notes
    for place in (folder, tmp_path / "checkpoint"):
        found = read_sparse(place, CONFIG)
        assert found is not None and (found.kept_share, found.threshold, found.choosing) == (None, 99, 7)
        assert found.budget(0, 3) == Budget(503, 700) and found.budget(1, 0) == Budget(500, 701)
        assert found.budget(1, 2) == Budget(130, 100)  # vLLM's 100 more, and the diagonals that are always kept
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)


@pytest.mark.parametrize("beside", [None, []])
def test_a_model_without_them_has_none(tmp_path: Path, beside: Any) -> None:
    folder = directory(tmp_path / "hf", beside=beside)
    assert read_sparse(folder, CONFIG) is None
    assert read_sparse(tmp_path, CONFIG) is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LAYERS * 2, "has 4 layers, expected a list of 2 layers: it belongs to another model"),
        ({"0": LAYERS[0]}, "is a dict, expected a list of 2 layers"),
        (
            [LAYERS[0], {**LAYERS[1], "4": LAYERS[1]["0"]}],
            "has 5 entries for layer 1, expected one for each of 4 heads",
        ),
        ([{"0": LAYERS[0]["0"]}, LAYERS[1]], "has 1 entry for layer 0, expected one for each of 4 heads"),
        ([LAYERS[0], []], "has a list for layer 1"),
        ([LAYERS[0], {**LAYERS[1], "3": ["stream_llm", 100, 800, 1]}], "layer 1, head 3 is .*only this kind"),
        ([LAYERS[0], {**LAYERS[1], "3": ["vertical_and_slash", -1, 800, 1]}], "layer 1, head 3 is"),
        ([LAYERS[0], {**LAYERS[1], "3": ["vertical_and_slash", True, 800, 1]}], "layer 1, head 3 is"),
        ([LAYERS[0], {**LAYERS[1], "3": 5}], "layer 1, head 3 is 5"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_those_of_another_model_are_refused(tmp_path: Path, layers: Any, message: str, beside: bool) -> None:
    folder = directory(
        tmp_path / "hf", {} if beside else {"sparse_attention_config": layers}, layers if beside else None
    )
    named = (
        "sparse_attention_config.json" if beside else "config.json: dual_chunk_attention_config.sparse_attention_config"
    )
    for read in (lambda: convert_from_hf(folder, tmp_path / "checkpoint"), lambda: from_pretrained(folder)):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert f"{folder}/{named}" in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True])
@pytest.mark.parametrize("key", ["sparse_attention_threshold", "sparse_attention_last_q"])
def test_sizes_are_positive_whole_numbers(tmp_path: Path, key: str, value: Any) -> None:
    folder = directory(tmp_path / "hf", {"sparse_attention_config": LAYERS, key: value})
    with pytest.raises(UserError, match=f"{key} is .*expected a positive whole number"):
        read_sparse(folder, CONFIG)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    folder = directory(tmp_path / "hf")
    (folder / "sparse_attention_config.json").write_text("[{")
    with pytest.raises(UserError, match=r"sparse_attention_config.json is not valid JSON"):
        convert_from_hf(folder, tmp_path / "checkpoint")

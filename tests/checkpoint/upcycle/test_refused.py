"""What does not fit is refused before anything is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_moe.checkpoint.upcycle.convert import upcycle
from qwen_moe.errors import UserError
from tests.checkpoint.huggingface.directories import by_hand, files_of
from tests.checkpoint.upcycle.cases import FINE, SAME, dense


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen2",
            {"expert_size": 21},
            "--expert-size 21 does not fit: an expert is cut from a feed-forward of intermedi",
        ),
        (
            "qwen2",
            {"shared_expert": 0},
            "becomes qwen2_moe, which always has a shared expert: give its size with --shared",
        ),
        ("qwen3", {}, "--shared-expert 24: a qwen3 model becomes qwen3_moe, which has no shared expert; leave it out"),
        ("qwen2", {"top_k": 7}, "num_experts_per_tok 7 is larger than num_experts 6"),
        ("qwen2", {"method": "copies"}, "--expert-size 7 with --method copies: each expert is a whole copy"),
        ("qwen2", {"dense_layers": (2,)}, "mlp_only_layers names layer 2 but there are 2"),
        ("qwen2", {"dense_layers": (1, 0)}, "no layer is MoE"),
        ("qwen2", {"reinitialize": 1.5}, "--reinitialize is 1.5, expected a share from 0 to 1"),
        (
            "qwen2",
            {"router": "groups"},
            "--expert-size 7 does not divide intermediate_size 20, so copies do not end at",
        ),
        (
            "qwen2",
            {"router": "groups", "expert_size": 5},
            "--experts 6 is not a multiple of the 4 experts that a copy of",
        ),
        ("qwen2", {"router": "softmax"}, "router is 'softmax', expected one of random, groups, even"),
        ("qwen2", {"method": "same_function"}, "give 5 or 10, or --method fine_grained --router random"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dense(tmp_path / "dense", family)
    with pytest.raises(UserError) as caught:
        upcycle(tmp_path / "dense", tmp_path / "moe", replace(FINE, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"], "nothing is left behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reinitialize": 0.5}, "new weights compute another function"),
        ({"scale": "none"}, "needs the scaling that --scale none leaves out"),
        ({"router": "random"}, "experts that are parts of one copy need one weight; use --router groups"),
        ({"top_k": 6}, "a token must visit whole copies of 4 experts. Give --norm-topk-prob with --router groups"),
        ({"router": "even"}, "an even router does not choose whole copies. Give"),
        ({"norm_topk_prob": False, "router": "groups"}, "the weights of the chosen experts add up to another number"),
        ({"norm_topk_prob": False, "expert_size": None, "router": "random"}, "add up to another number for each token"),
    ],
    ids=str,
)
def test_another_function_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dense(tmp_path / "dense", "qwen3")
    with pytest.raises(UserError) as caught:
        upcycle(tmp_path / "dense", tmp_path / "moe", replace(SAME, **changes))
    assert message in str(caught.value) and not (tmp_path / "moe").exists()


def test_what_is_no_dense_model_is_refused(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", FINE)

    def refusal(source: str, target: str = "new") -> str:
        with pytest.raises(UserError) as caught:
            upcycle(tmp_path / source, tmp_path / target, FINE)
        assert target == "moe" or not (tmp_path / target).exists()
        return str(caught.value)

    assert "is a mixture of experts already (qwen2_moe, 6 experts): upcycling starts from a dense" in refusal("moe")
    assert "does not exist: give a local Hugging Face model directory or a checkpoint" in refusal("nothing")
    before = files_of(tmp_path / "moe")
    assert "exists and is not empty: give a new directory" in refusal("dense", "moe")
    assert files_of(tmp_path / "moe") == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    by_hand(tmp_path / "nan", model, torch.float32, 1)
    assert "tensor model.layers.1.mlp.up_proj.weight" in refusal("nan") and "NaN" in refusal("nan")


def test_gate_and_up_must_have_one_dtype_and_scaled_weights_must_fit(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense", dtype=torch.float16)
    file = tmp_path / "dense" / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {name: stored[name].float()}, file)
    with pytest.raises(UserError, match="experts stack them in one tensor"):
        upcycle(tmp_path / "dense", tmp_path / "moe", FINE)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[2, 3] = 60000
    by_hand(tmp_path / "large", model, torch.float16, 1)
    with pytest.raises(
        UserError, match=r"1 value of tensor model.layers.0.mlp.down_proj, scaled by up to 1.4\d*, is larger"
    ):
        upcycle(tmp_path / "large", tmp_path / "moe", FINE)
    assert not (tmp_path / "moe").exists()

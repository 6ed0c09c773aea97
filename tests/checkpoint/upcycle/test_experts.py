"""Where the weights of each expert, and all others, come from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_moe
from qwen_moe.checkpoint.huggingface.names import expert_biases
from qwen_moe.checkpoint.resolve import model_config
from qwen_moe.checkpoint.upcycle.convert import upcycle
from qwen_moe.checkpoint.upcycle.settings import UpcycleSettings, make_plan
from qwen_moe.config import parse_model
from qwen_moe.models.decoder import DecoderLM
from tests.checkpoint.upcycle.cases import FINE, SHARED, WIDTH, dense, tensors

Experts = dict[str, torch.Tensor]


def part_of(name: str) -> str:
    return name.rsplit(".", 2)[-2].removesuffix("_proj")


def feed_forward(model: DecoderLM, layer: int) -> dict[str, torch.Tensor]:
    """gate, up and down of a dense layer, each [I, D]: one row for an intermediate index."""
    prefix = f"model.layers.{layer}.mlp."
    found = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    return {part_of(name): tensor.T if "down" in name else tensor for name, tensor in found.items()}


def experts_of(made: dict[str, torch.Tensor], layer: int) -> Experts:
    """gate, up and down of all experts of a layer, each [E, F, D]."""
    prefix = f"model.layers.{layer}.mlp.experts."
    joined = made[prefix + "gate_up_proj"]
    return {"gate": joined[:, 0], "up": joined[:, 1], "down": made[prefix + "down_proj"].transpose(1, 2)}


def places(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Where each of ``rows`` is among the rows of ``among``, to the bit; -1 for one that is not there."""
    same = (rows[:, None] == among[None]).all(2)
    return [int(line.nonzero()[0]) if line.any() else -1 for line in same]


def origins(experts: Experts, source: dict[str, torch.Tensor]) -> list[list[int]]:
    """The dense index of each index of each expert, or -1 if it is new; the same for gate, up and down."""
    found = []
    for expert in range(len(experts["gate"])):
        by_part = {name: places(experts[name][expert], source[name]) for name in ("gate", "up", "down")}
        assert by_part["gate"] == by_part["up"] == by_part["down"]
        found.append(by_part["gate"])
    return found


def flat(lists: list[list[int]]) -> list[int]:
    return [one for part in lists for one in part]


def made(folder: Path, settings: UpcycleSettings, family: str = "qwen2", **changes: Any) -> tuple[DecoderLM, Experts]:
    """The dense model and the tensors that ``settings`` make of it."""
    model = dense(folder / "dense", family, **changes)
    upcycle(folder / "dense", folder / "moe", settings)
    return model, tensors(folder / "moe")


def test_the_experts_of_a_copy_are_a_permutation_of_the_feed_forward(tmp_path: Path) -> None:
    settings = replace(SHARED, method="fine_grained", reinitialize=0.0, scale="none")
    model, after = made(tmp_path, settings)
    orders = []
    for layer in range(2):
        found = origins(experts_of(after, layer), feed_forward(model, layer))
        copies = [flat(found[:4]), flat(found[4:])]
        assert all(sorted(copy) == list(range(WIDTH)) for copy in copies)
        orders += copies
    assert len({tuple(order) for order in [*orders, range(WIDTH)]}) == 5, "each copy is shuffled in its own way"


def test_experts_are_cut_one_behind_the_other_and_the_rest_is_discarded(tmp_path: Path) -> None:
    """6 experts of 7 need ceil(42 / 20) = 3 copies; the third expert has the end of one copy and the start of the next."""
    model, after = made(tmp_path, replace(FINE, reinitialize=0.0, scale="none"))
    row = flat(origins(experts_of(after, 0), feed_forward(model, 0)))
    assert sorted(row[:20]) == sorted(row[20:40]) == list(range(WIDTH)) and len(set(row[40:])) == 2
    assert row[:20] != row[20:40]


def test_whole_copies_are_the_feed_forward_itself(tmp_path: Path) -> None:
    settings = UpcycleSettings(num_experts=3, top_k=2, method="copies", scale="none", shared_expert=9)
    model, after = made(tmp_path, settings)
    for name, matrices in experts_of(after, 1).items():
        assert all(torch.equal(matrix, feed_forward(model, 1)[name]) for matrix in matrices)


@pytest.mark.parametrize(
    ("size", "share", "new"), [(7, 0.5, 3), (5, 0.5, 2), (10, 0.29, 2), (20, 0.35, 7), (7, 1.0, 7)]
)
def test_as_many_indices_are_new_as_asked_in_gate_up_and_down_alike(
    size: int, share: float, new: int, tmp_path: Path
) -> None:
    model, after = made(tmp_path, replace(FINE, expert_size=size, reinitialize=share, scale="none"))
    for layer in range(2):
        patterns = set()
        for found in origins(experts_of(after, layer), feed_forward(model, layer)):
            assert found.count(-1) == new and len(set(found)) >= size - new
            patterns.add(tuple(index < 0 for index in found))
        assert len(patterns) > 1 or new == size, "each expert keeps other indices"
    shared = after["model.layers.0.mlp.shared_expert.up_proj.weight"]
    assert -1 not in places(shared, feed_forward(model, 0)["up"]), "the shared expert keeps what the dense model knows"


def test_as_many_elements_are_new_as_asked(tmp_path: Path) -> None:
    model, after = made(tmp_path, replace(FINE, reinitialize_what="elements", reinitialize_shared=True, scale="none"))
    old, again = feed_forward(model, 0), tensors(tmp_path / "moe")
    upcycle(tmp_path / "dense", tmp_path / "kept", replace(FINE, reinitialize=0.0, scale="none"))
    kept = experts_of(tensors(tmp_path / "kept"), 0)
    patterns = {name: matrices != kept[name] for name, matrices in experts_of(after, 0).items()}
    assert not any(torch.equal(patterns["gate"], patterns[name]) for name in ("up", "down"))
    for pattern in patterns.values():
        changed = pattern.flatten(1)
        assert changed.sum(1).tolist() == [7 * 16 // 2] * 6
        assert len({tuple(line.tolist()) for line in changed}) == 6
    shared = again["model.layers.0.mlp.shared_expert.gate_proj.weight"]
    whole_copy = shared[:WIDTH] != old["gate"]
    assert 0.4 < float(whole_copy.double().mean()) < 0.6


def test_new_weights_have_the_mean_and_spread_of_those_they_replace_or_the_initializers(tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 4, "initializer_range": 0.5}
    settings = UpcycleSettings(num_experts=4, top_k=2, expert_size=64, reinitialize=1.0, scale="none")
    model = dense(tmp_path / "dense", "qwen3", **wide)
    with torch.no_grad():  # a matrix whose mean shows
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(3).add_(2)
    qwen_moe.save_pretrained(model, tmp_path / "shifted")
    for std in ("replaced", "initializer"):
        upcycle(tmp_path / "shifted", tmp_path / std, replace(settings, reinitialize_std=std))
    old, replaced, fixed = (
        feed_forward(model, 0),
        *(experts_of(tensors(tmp_path / name), 0) for name in ("replaced", "initializer")),
    )
    for name in ("gate", "up", "down"):
        assert float(replaced[name].mean()) == pytest.approx(float(old[name].mean()), abs=0.02)
        assert float(replaced[name].std()) == pytest.approx(float(old[name].std()), rel=0.03)
        assert float(fixed[name].mean()) == pytest.approx(0, abs=0.02)
        assert float(fixed[name].std()) == pytest.approx(0.5, rel=0.03)
    assert set(places(fixed["up"][0], fixed["up"][1:].flatten(0, 1))) == {-1}, "each expert draws its own"


@pytest.mark.parametrize(
    "settings", [FINE, SHARED, replace(FINE, router="random", seed=5)], ids=["fine", "same", "seed"]
)
def test_every_other_tensor_is_the_dense_models_to_the_bit(settings: UpcycleSettings, tmp_path: Path) -> None:
    model, after = made(tmp_path, replace(settings, dense_layers=(1,)), dtype=torch.bfloat16)
    before = model.state_dict()
    if not model.config.has_lm_head:
        before.pop("lm_head.weight", None)
    kept = {name for name in before if not name.startswith("model.layers.0.mlp.")}
    config = model_config(tmp_path / "moe")
    new = {name for name in after if name.startswith("model.layers.0.mlp.")}
    assert after.keys() == kept | new and new >= expert_biases(config).keys()
    assert len(kept) > 20 and "model.layers.1.mlp.up_proj.weight" in kept
    for name in kept:
        assert after[name].dtype == torch.bfloat16 and torch.equal(
            after[name].view(torch.int16), before[name].view(torch.int16)
        )
    assert all(after[name].dtype == torch.bfloat16 for name in new - expert_biases(config).keys())


def test_routers_and_gates_are_new(tmp_path: Path) -> None:
    dense(tmp_path / "dense", initializer_range=0.3)
    found = {}
    for router in ("random", "groups", "even"):
        upcycle(tmp_path / "dense", tmp_path / router, replace(SHARED, method="fine_grained", router=router))
        after = tensors(tmp_path / router)
        found[router] = after["model.layers.0.mlp.gate.weight"]
        assert not after["model.layers.0.mlp.shared_expert_gate.weight"].any()
    assert not found["even"].any() and len(found["random"].unique(dim=0)) == 8
    assert float(found["random"].std()) == pytest.approx(0.3, rel=0.2)
    assert len(found["groups"].unique(dim=0)) == 2
    assert torch.equal(found["groups"][0], found["groups"][3]) and torch.equal(found["groups"][4], found["groups"][7])


def test_the_published_sizes_come_out() -> None:
    """Qwen2-57B-A14B, as its config.json describes it, from the shape of Qwen2-7B, in 9 copies (arXiv 2407.10671, 2.2.2)."""
    published = parse_model({"preset": "qwen2-57b-a14b"}, "test")
    source = parse_model({"preset": "qwen2.5-7b", "vocab_size": published.vocab_size}, "test")
    settings = replace(FINE, num_experts=64, top_k=8, expert_size=2560, shared_expert=20480, norm_topk_prob=False)
    plan = make_plan(source, settings, "Qwen2-7B")
    assert plan.moe == published and plan.copies == 9 and plan.discarded == 9 * 18_944 - 64 * 2560
    assert plan.reinitialize == 0.5 and plan.reinitialized(2560) == 1280
    # In binary, 0.29 is a little less.
    assert make_plan(source, replace(settings, reinitialize=0.29), "Qwen2-7B").reinitialized(100) == 29

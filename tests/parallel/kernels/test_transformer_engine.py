"""The Transformer Engine provider in whole models and layouts, with a stand-in whose arithmetic is plain torch's: what is
left to differ from torch's matmuls is what the provider does around them.

`fake_te` refuses what the real one would; `test_te_contract` holds names and signatures against the real sources.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from parallel.data import local
from parallel.kernels.interface import ExpertPart
from parallel.kernels.quantizer import Recipe
from parallel.kernels.transformer_engine import (
    KernelsUnavailable,
    TransformerEngineKernels,
    load_transformer_engine,
)
from parallel.mesh import Axis
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.verify.case import global_batch
from qwen_moe.verify.ranks import make_trainer
from tests.distributed import run_distributed
from tests.parallel.kernels import fake_te
from tests.training.test_step import make_config

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
DELAYED = Recipe(name="delayed", hybrid=True, history_length=4)
CURRENT = Recipe(name="current", hybrid=True)
BLOCKWISE = Recipe(name="blockwise", hybrid=False)


def config(**changes: Any) -> RunConfig:
    model = {f"model__{key}": value for key, value in MODEL.items()}
    return make_config(**(model | {"training__micro_batch_size": 1} | changes))


def qwen3(**changes: Any) -> RunConfig:
    return config(model__family="qwen3_moe", model__shared_expert_intermediate_size=0, **changes)


Between = Callable[[Any, int], None]


def train(config: RunConfig, scaling: Recipe | str | None, between: Between | None = None) -> dict[str, Any]:
    """Three steps on this rank with the provider, or ("plain") with torch's matmuls."""
    from qwen_moe.sharding import build

    if scaling != "plain":
        fake_te.install()
        recompute = config.training.recompute == "full"
        build.choose_kernels = lambda config, grids: TransformerEngineKernels(  # type: ignore[attr-defined]
            grids.tp, grids.stage, scaling, keep_weights=config.parallel.sharding == "zero2", recompute=recompute
        )
    trainer = make_trainer(config)
    kernels, dp, figures = trainer.model.kernels, trainer.grids.dp, []
    for step in range(3):
        share = 8 // dp.size
        mine = {
            name: t[dp.index * share : (dp.index + 1) * share] for name, t in global_batch(trainer.config, step).items()
        }
        result = trainer.step(step, [{name: t[i : i + 1] for name, t in mine.items()} for i in range(share)])
        figures.append([result.loss, result.metrics["balance_loss"], result.grad_norm])
        if between is not None:
            between(trainer, step)
    return {
        "figures": torch.tensor(figures, dtype=torch.float64),
        "parameters": {name: p.full_tensor().detach().clone() for name, p in trainer.model.named_parameters()},
        "state": {name: tensor.clone() for name, tensor in kernels.state().items()},
        "log": list(fake_te._Global.log),
    }


_PLAIN: dict[str, list[dict[str, Any]]] = {}


def plain(world_size: int, config: RunConfig) -> list[dict[str, Any]]:
    """Every rank's run with torch's matmuls, done once."""
    key = f"{world_size} {config}"
    if key not in _PLAIN:
        _PLAIN[key] = run_distributed(train, world_size, config, "plain")
    return _PLAIN[key]


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine["figures"], plain["figures"], rtol=1e-10, atol=1e-12)
        assert mine["parameters"].keys() == plain["parameters"].keys()
        for name, parameter in plain["parameters"].items():
            torch.testing.assert_close(mine["parameters"][name], parameter, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    ("family", "scaling"), [("qwen2_moe", None), ("qwen3_moe", DELAYED), ("qwen2_moe", BLOCKWISE)], ids=str
)
def test_one_process_equals_plain_matmuls(family: str, scaling: Recipe | None) -> None:
    case = config() if family == "qwen2_moe" else qwen3()
    assert_same(run_distributed(train, 1, case, scaling), plain(1, case))


LAYOUTS = {
    "tp=2,ep=2": {"parallel__tp": 2, "parallel__ep": 2},
    "tp=2,etp=2,zero3": {"parallel__tp": 2, "parallel__etp": 2, "parallel__sharding": "zero3"},
    "pp=2,ep=2": {"parallel__pp": 2, "parallel__ep": 2},
}


@pytest.mark.parametrize(
    ("layout", "scaling"),
    [("tp=2,ep=2", DELAYED), ("tp=2,etp=2,zero3", DELAYED), ("pp=2,ep=2", DELAYED), ("tp=2,ep=2", CURRENT)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_layouts_equal_plain_matmuls(layout: str, scaling: Recipe) -> None:
    case = config(**LAYOUTS[layout])
    got = run_distributed(train, 4, case, scaling)
    assert_same(got, plain(4, case))
    if scaling is not DELAYED:
        assert not any(rank["state"] for rank in got)
        return
    check_state(got)
    # Once for each part and micro-batch, in both directions.
    micro_batches = 8 // (2 if "pp" in layout or "tp" in layout else 4)
    for rank in got:
        assert rank["log"].count("forward") == rank["log"].count("backward") == 3 * micro_batches


def check_state(ranks: list[dict[str, Any]]) -> None:
    """Equal on all ranks that hold it, by names of the whole model, with the largest value of the whole weight in it."""
    seen: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, tensor in rank["state"].items():
            assert torch.equal(seen.setdefault(name, tensor), tensor), name
    experts = {name.split(".")[6] for name in seen if ".experts.gate_up_proj." in name}
    assert experts == {str(expert) for expert in range(8)}
    history, scale = (seen[f"model.layers.0.self_attn.q_proj.forward.{what}"] for what in ("amax_history", "scale"))
    assert history.shape == (4, 3) and scale.shape == (3,)
    torch.testing.assert_close(scale[:2], 448 / history.amax(0)[:2])
    gradients = seen["model.layers.0.self_attn.q_proj.backward.scale"]
    assert gradients.shape == (2,) and gradients[0] != 1


def _amaxes_of_weights(trainer: Any, step: int) -> None:
    """After a step, the weights that its micro-batches used are known from the step before: the largest value of each."""
    for name, largest in getattr(trainer, "noted", {}).items():
        history = trainer.model.kernels.state()[f"{name.removesuffix('.weight')}.forward.amax_history"]
        # The last row is the newest. The weight is split over tp: this holds only if its amax was reduced over ranks.
        torch.testing.assert_close(history[-1, 1].double(), largest, rtol=1e-6, atol=0)
    named = trainer.model.named_parameters()
    trainer.noted = {name: local(p).detach().abs().max() for name, p in named if name.endswith("q_proj.weight")}
    for largest in trainer.noted.values():
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)


def test_an_amax_is_that_of_all_ranks() -> None:
    run_distributed(train, 2, config(parallel__tp=2), DELAYED, _amaxes_of_weights)


def _evaluate(trainer: Any, step: int) -> None:
    """With weights a hundred times as large, so that it shows if their amaxes stay."""
    weights = [local(p) for _, p in trainer.model.named_parameters()]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_mul_(weights, 100)
        trainer.evaluate([{name: tensor[:1] for name, tensor in global_batch(trainer.config, 50).items()}])
        torch._foreach_copy_(weights, before)


def test_evaluation_leaves_no_trace() -> None:
    whole = Recipe(name="delayed", hybrid=True, history_length=32)  # more than the run's micro-batches
    got = run_distributed(train, 1, config(), whole, _evaluate)[0]
    expected = run_distributed(train, 1, config(), whole)[0]
    assert torch.equal(got["figures"], expected["figures"])
    for name, tensor in expected["state"].items():
        # Row 0 is what the last evaluation has seen, and no update has taken up.
        rows = slice(1, None) if name.endswith("amax_history") else slice(None)
        assert torch.equal(got["state"][name][rows], tensor[rows]), name


def test_recomputed_layers_equal_plain_matmuls() -> None:
    case = config(training__recompute="full")
    assert_same(run_distributed(train, 1, case, CURRENT), plain(1, config()))


def _refused(config: RunConfig, scaling: Recipe) -> str:
    try:
        train(config, scaling)
    except (KernelsUnavailable, UserError) as error:
        return str(error)
    return "nothing was refused"


def test_refusals_of_a_model() -> None:
    message = run_distributed(_refused, 1, config(training__recompute="full"), DELAYED)[0]
    assert "cannot recompute layers in backward" in message and "delayed" in message
    message = run_distributed(_refused, 1, config(model__moe_intermediate_size=24), CURRENT)[0]
    assert "model.layers.0.mlp.experts.gate_up_proj" not in message or "multiples of 16" in message
    assert "multiples of 16 in Transformer Engine" in message
    message = run_distributed(_refused, 1, config(), Recipe(name="mxfp8", hybrid=False))[0]
    assert "compute capability 10.0" in message


@pytest.fixture
def fake() -> Iterator[None]:
    fake_te.install()
    yield
    fake_te.uninstall()


AXIS = Axis("tp", 1, 0, None)


def test_a_release_that_was_not_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_te.install("1.13.0")
    with pytest.raises(KernelsUnavailable, match=r"1\.13\.0 is installed; supported are 2\.9\.0 to"):
        load_transformer_engine()
    fake_te.install("2.16.0+cuda13")  # another patch of a minor release that was
    load_transformer_engine()
    fake_te.uninstall()
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # also where the real one is installed
    with pytest.raises(KernelsUnavailable, match="cannot be imported"):
        load_transformer_engine()


def _grouped(kernels: TransformerEngineKernels, counts: list[int]) -> tuple[torch.Tensor, ...]:
    """Output and gradients of one grouped matmul over ``counts`` rows."""
    generator = torch.Generator().manual_seed(0)
    matmul = kernels.grouped("experts", ExpertPart(total=8, first=4, count=len(counts)))
    kernels.materialize(torch.device("cpu"))
    x = torch.randn(sum(counts), 32, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), 16, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    kernels.begin_step()
    with kernels.forward():
        y = matmul(x, weight, torch.tensor(counts))
    (y * y).sum().backward()
    kernels.end_step()
    return y.detach(), x.grad, weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("counts", [[3, 0, 17, 16], [0, 0, 0, 5], [0, 0, 0, 0], [16, 16, 16, 16]])
@pytest.mark.parametrize("scaling", [None, CURRENT, DELAYED], ids=lambda s: s.name if s else "bf16")
def test_uneven_and_empty_experts(fake: None, counts: list[int], scaling: Recipe | None) -> None:
    kernels = TransformerEngineKernels(AXIS, AXIS, scaling, keep_weights=True)
    y, dx, dw = _grouped(kernels, counts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 32, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), 16, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([part @ w.T for part, w in zip(x.split(counts), weight)])
    (expected * expected).sum().backward()
    for got, want in ((y, expected.detach()), (dx, x.grad), (dw, weight.grad)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for name, tensor in kernels.state().items():  # padding is zeros: no row of it is an amax
        expert = int(name.split(".")[1]) - 4
        if name.endswith("forward.amax_history"):
            rows = x.detach().split(counts)[expert]
            assert float(tensor[-1, 0]) == pytest.approx(float(rows.abs().max()) if len(rows) else 0.0, rel=1e-6)


def test_state_loaded_before_the_first_use_is_what_is_used(fake: None) -> None:
    first = TransformerEngineKernels(AXIS, AXIS, DELAYED, keep_weights=True)
    _grouped(first, [3, 5])
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    fake_te.install()
    second = TransformerEngineKernels(AXIS, AXIS, DELAYED, keep_weights=True)
    matmul = second.grouped("experts", ExpertPart(total=8, first=4, count=2))
    second.materialize(torch.device("cpu"))
    assert second.state().keys() == saved.keys()
    for name, tensor in second.state().items():
        tensor.copy_(saved[name])
    x = torch.zeros(8, 32, dtype=torch.float64)
    with torch.no_grad(), second.forward():
        matmul(x, torch.zeros(2, 16, 32, dtype=torch.float64), torch.tensor([3, 5]))
    meta = matmul.te_grouped_linear.fp8_meta["scaling_fwd"]  # type: ignore[attr-defined]
    assert torch.equal(meta.scale[3:], saved["experts.5.forward.scale"]) and bool((meta.scale[:2] != 1).all())
    for name, tensor in second.state().items():  # and it is Transformer Engine's own memory from now on
        assert torch.equal(tensor, saved[name]), name
    second.state()["experts.5.forward.scale"].fill_(7.0)
    assert bool((meta.scale[3:] == 7).all())

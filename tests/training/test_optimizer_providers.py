"""Other libraries' AdamW against torch's, step by step, and a change of provider at a checkpoint.

DeepSpeed's compiles its kernel at first use (about a minute) and is skipped where it is not installed:

    pip install deepspeed && python -m pytest tests/training/test_optimizer_providers.py

Apex needs a GPU. Its place is taken by a class with its signatures and rules (apex/optimizers/fused_adam.py).
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen_moe.checkpoint.optimizer_state import optimizer_state, set_updates_done
from qwen_moe.config import OptimizerConfig
from qwen_moe.errors import UserError
from qwen_moe.training.optimizer import build_optimizer, set_learning_rate
from qwen_moe.verify.case import global_batch
from tests.distributed import run_distributed
from tests.training.test_step import make_config

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"
)
PROVIDERS = ["apex", pytest.param("deepspeed", marks=needs_deepspeed)]


class FakeFusedAdam(torch.optim.Optimizer):
    """Apex's FusedAdam: the step is counted by group, moments are float32, `zero_grad` takes nothing, DTensors break it."""

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999), eps: float = 1e-8,
        adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False, set_grad_none: bool = True,
        capturable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode and bias_correction and not amsgrad and not capturable

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("not called by us")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m, v = state["exp_avg"], state["exp_avg_sq"]
                assert type(p.data) is torch.Tensor and type(p.grad) is torch.Tensor and type(m) is torch.Tensor
                assert m.dtype == v.dtype == torch.float32 and p.numel()
                gradient = p.grad.float()
                m.mul_(beta1).add_(gradient, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                update = (m / (1 - beta1 ** group["step"])) / ((v / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
                p.copy_(p.float() - group["lr"] * (update + group["weight_decay"] * p.float()))


def install_fake_apex() -> None:
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FakeFusedAdam  # type: ignore[attr-defined]
    apex.optimizers = optimizers  # type: ignore[attr-defined]
    sys.modules["apex"], sys.modules["apex.optimizers"] = apex, optimizers


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    install_fake_apex()


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(33, 65, generator=generator).to(dtype))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.randn(65, generator=generator).to(dtype))


def run(provider: str, steps: int, switch_at: int = -1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Parameters after each step on the same gradients; at ``switch_at`` the state moves to torch's AdamW by name."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, provider=provider)  # type: ignore[arg-type]
    model = Small(dtype)
    optimizer = build_optimizer(model, config)
    history, generator = [], torch.Generator().manual_seed(1)
    for step in range(steps):
        if step == switch_at:
            saved = optimizer_state(model, optimizer)
            optimizer = build_optimizer(model, config.model_copy(update={"provider": "torch"}))
            for moment, tensors in optimizer_state(model, optimizer).items():
                for name, tensor in tensors.items():
                    tensor.copy_(saved[moment][name])
            set_updates_done(model, optimizer, step)
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history += [p.detach().clone() for p in model.parameters()]
    return history


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("switch_at", [-1, 3])
def test_every_step_is_that_of_torchs_adamw(apex: None, provider: str, switch_at: int) -> None:
    for got, expected in zip(run(provider, 6, switch_at), run("torch", 6), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_bf16_weights_keep_float32_moments(apex: None, provider: str) -> None:
    """Against AdamW in float32 with weights rounded to bf16 after every step: half a unit in the last place, six times."""
    got = run(provider, 6, dtype=torch.bfloat16)
    for step, (mine, expected) in enumerate(zip(got, run("torch", 6), strict=True)):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), expected, rtol=2**-8 * (step + 2), atol=1e-3)


def test_a_parameter_without_a_gradient_is_left_alone(apex: None) -> None:
    model = Small()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2, provider="apex"))
    before = model.norm.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(AssertionError):  # Apex counts by group: it would be updated as of a step that it did not take
        optimizer.step()
    assert torch.equal(model.norm.weight, before)


def _train(provider: str, root: Path, resumed: bool) -> list[torch.Tensor]:
    """Two sharded steps and a checkpoint with ``provider``; or that checkpoint gone on with torch's for two steps."""
    from qwen_moe.checkpoint.distributed import CheckpointWriter, resume
    from qwen_moe.verify.ranks import make_trainer
    from tests.checkpoint.test_distributed import _state

    if provider == "apex":
        install_fake_apex()
    config = make_config(
        optimizer__provider="torch" if resumed else provider, training__micro_batch_size=4,
        precision__compute="fp32", precision__master="fp32",
    )  # fmt: skip
    trainer = make_trainer(config)
    writer = CheckpointWriter(root, keep=2, asynchronous=False, config=config.model, compute_dtype="fp32")
    first = 0
    if resumed:
        first = resume(root / "step_00000002", trainer.model, trainer.optimizer, config.model).step
    rank = torch.distributed.get_rank()
    for step in range(first, 4):
        batch = global_batch(config, step)
        trainer.step(step, [{name: tensor[rank * 4 : rank * 4 + 4] for name, tensor in batch.items()}])
        if step == 1 and not resumed:
            writer.save(trainer.model, trainer.optimizer, _state(2))
    return [p.full_tensor().detach().clone() for _, p in trainer.model.named_parameters()]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_sharded_training_and_a_change_of_provider_at_a_checkpoint(tmp_path: Path, provider: str) -> None:
    expected = run_distributed(_train, 2, "torch", tmp_path / "torch", False)[0]
    straight = run_distributed(_train, 2, provider, tmp_path / "other", False)[0]
    switched = run_distributed(_train, 2, provider, tmp_path / "other", True)[0]
    for a, b, c in zip(expected, straight, switched, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(provider: str, dtype: torch.dtype = torch.float32) -> None:
        build_optimizer(Small(dtype), OptimizerConfig(learning_rate=1e-2, provider=provider))  # type: ignore[arg-type]

    with pytest.raises(UserError, match="no kernel for float64"):
        build("deepspeed", torch.float64)
    for name in ("apex", "apex.optimizers", "deepspeed", "deepspeed.ops", "deepspeed.ops.adam"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "apex" else find_spec(name))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "apex").exists()])
    with pytest.raises(UserError, match="NVIDIA Apex is not installed"):
        build("apex")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        build("deepspeed")
    # PyPI's package of that name.
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    web_toolkit = types.ModuleType("apex")
    web_toolkit.__spec__ = importlib.util.spec_from_loader("apex", None)
    monkeypatch.setitem(sys.modules, "apex", web_toolkit)
    with pytest.raises(UserError, match="it is not NVIDIA's"):
        build("apex")


def test_a_kernel_that_does_not_compile_is_told_as_such(apex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(sys.modules["apex.optimizers"], "FusedAdam", Broken)
    with pytest.raises(UserError, match="does not work on this machine"):
        build_optimizer(Small(), OptimizerConfig(learning_rate=1e-2, provider="apex"))


def test_a_provider_is_no_setting_of_the_trajectory() -> None:
    """A run, and a branch of it, may go on with another; and with checkpoints from before there were providers."""
    from qwen_moe.runs.identity import saved_settings
    from qwen_moe.training.branch import check_branch

    torchs, apexs = make_config(), make_config(optimizer__provider="apex")
    saved = saved_settings(torchs)
    assert saved == saved_settings(apexs) and "provider" not in saved["optimizer"]
    check_branch(apexs, saved, 1, Path("trunk"))
    with pytest.raises(UserError, match=r"optimizer\.beta1 was 0\.9, is now 0\.8"):
        check_branch(make_config(optimizer__beta1=0.8), saved, 1, Path("trunk"))

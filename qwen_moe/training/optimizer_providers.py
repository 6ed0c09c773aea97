"""AdamW by other libraries: NVIDIA Apex's ``FusedAdam``, and DeepSpeed's ``DeepSpeedCPUAdam``, whose state stays in host
memory. Neither supports DTensors, so both work on this rank's shards. State has the names of torch's AdamW, so a run may
change its provider at any checkpoint."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from parallel.data import local, zeros_like_shard
from qwen_moe.config import OptimizerConfig
from qwen_moe.errors import UserError

Library = Callable[..., torch.optim.Optimizer]


def _apex() -> Library:
    try:
        from apex.optimizers import FusedAdam
    except (ImportError, AttributeError) as error:
        if importlib.util.find_spec("apex") is None:
            raise UserError(
                "optimizer.provider apex: NVIDIA Apex is not installed. Build it from github.com/NVIDIA/apex (never `pip "
                "install apex`: the package of that name is an unrelated web toolkit), or use optimizer.provider=torch"
            ) from None
        raise UserError(
            f"optimizer.provider apex: the installed package named apex has no apex.optimizers.FusedAdam ({error}): it is "
            "not NVIDIA's. Uninstall it and build github.com/NVIDIA/apex, or use optimizer.provider=torch"
        ) from None
    return FusedAdam


def _deepspeed() -> Library:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise UserError(
            f"optimizer.provider deepspeed: DeepSpeedCPUAdam cannot be imported ({error}): pip install deepspeed, or use "
            "optimizer.provider=torch"
        ) from None
    return DeepSpeedCPUAdam


def provided_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW by ``config.provider`` over parameter ``groups`` with their weight decay. Raises UserError if the provider is
    not installed, does not work on this machine, or has no kernel for the parameters' dtype."""
    dtypes = {p.dtype for group in groups for p in group["params"]}
    if torch.float64 in dtypes:
        raise UserError(
            f"optimizer.provider {config.provider} has no kernel for float64 weights: use optimizer.provider=torch, or "
            "precision.master=fp32"
        )
    if config.provider == "apex":
        return ProvidedAdamW(groups, config, _apex(), {"adam_w_mode": True}, on_host=False)
    return ProvidedAdamW(groups, config, _deepspeed(), {"adamw_mode": True}, on_host=True)


def _zeros(parameter: torch.Tensor, on_host: bool) -> torch.Tensor:
    """float32 zeros like ``parameter`` (a DTensor if it is one), in host memory with ``on_host``."""
    zeros = zeros_like_shard(parameter, torch.float32)
    if not on_host or zeros.device.type == "cpu":
        return zeros
    if not isinstance(zeros, DTensor):
        return zeros.cpu()
    # As in FSDP2's CPU offload, the mesh has GPUs while the shard is on the CPU.
    return DTensor(zeros.to_local().cpu(), zeros._spec, requires_grad=False)


class ProvidedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on shards, computed by ``library``.

    ``state[parameter]`` holds ``exp_avg``, ``exp_avg_sq`` (float32) and ``step``, as in torch's AdamW. With ``on_host`` the
    moments are in host memory; weights and gradients on GPUs are copied there, and the weights are copied back.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        library: Library,
        options: dict[str, Any],
        *,
        on_host: bool,
    ) -> None:
        settings = {
            "lr": config.learning_rate,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": 0.0,
        }
        super().__init__(groups, settings)
        self.on_host = on_host
        self._pairs: list[list[tuple[torch.Tensor, nn.Parameter]]] = []
        for group in self.param_groups:
            pairs = []
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": _zeros(parameter, on_host),
                    "exp_avg_sq": _zeros(parameter, on_host),
                }
                # A rank's shard may be empty, which the kernels do not support.
                if local(parameter).numel():
                    pairs.append((parameter, nn.Parameter(self._near(local(parameter.detach())))))
            self._pairs.append(pairs)
        shards = [
            {"params": [shard for _, shard in pairs], "weight_decay": group["weight_decay"]}
            for group, pairs in zip(self.param_groups, self._pairs, strict=True)
            if pairs
        ]
        self._library = None
        if shards:
            try:
                self._library = library(shards, **(settings | options))
            except RuntimeError as error:  # both build or load a compiled kernel here
                raise UserError(
                    f"optimizer.provider {config.provider} does not work on this machine: {error} (use "
                    "optimizer.provider=torch)"
                ) from error

    def _near(self, shard: torch.Tensor) -> torch.Tensor:
        return shard.cpu() if self.on_host else shard

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        if self._library is None:
            return
        groups = iter(self._library.param_groups)
        for group, pairs in zip(self.param_groups, self._pairs, strict=True):
            if pairs:
                self._lend(group, pairs, next(groups))
        self._library.step()
        for pairs in self._pairs:
            for parameter, shard in pairs:
                shard.grad = None
                if self.on_host and parameter.device.type != "cpu":
                    local(parameter).copy_(shard)
                    shard.data = shard.new_empty(0)

    def _lend(self, group: dict[str, Any], pairs: list[tuple[torch.Tensor, nn.Parameter]], to: dict[str, Any]) -> None:
        """Hand the library one group's weights, gradients, moments, step and settings."""
        assert self._library is not None
        for key in ("lr", "betas", "eps", "weight_decay"):
            to[key] = group[key]
        steps = set()
        for parameter, shard in pairs:
            state = self.state[parameter]
            if parameter.grad is None:
                continue
            if state["step"].device.type != "cpu":  # a resume puts it on the device
                state["step"] = state["step"].cpu()
            done = int(state["step"])
            steps.add(done)
            shard.data = self._near(local(parameter).detach())
            shard.grad = self._near(local(parameter.grad))
            self._library.state[shard] = {
                "step": done,
                "exp_avg": local(state["exp_avg"]),
                "exp_avg_sq": local(state["exp_avg_sq"]),
            }
            state["step"] += 1
        if not self.on_host:
            # Apex counts steps per group. In our training every parameter has a gradient in every step.
            assert len(steps) == 1, f"parameters of one group were updated {sorted(steps)} times"
            to["step"] = steps.pop()

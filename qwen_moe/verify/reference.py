"""Reference training in one process, written with means, torch's own cross-entropy and AdamW, and no distributed code.

It shares the model's layers with the runs that it checks, but not their attention core, mixture of experts, losses, sums,
clipping or optimizer.
Packed documents are computed one by one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qwen_moe.config import RunConfig
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.training.schedule import learning_rate
from qwen_moe.verify.case import drawn_value, global_batch
from qwen_moe.verify.plain import Answer, plain_loss
from qwen_moe.verify.plain_moe import use_plain_moe
from qwen_moe.verify.probe import probe_loss
from qwen_moe.verify.unpacked import alone, answers_of, together


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Figures and gradients (before clipping) of a few steps, and the final parameters, by name. ``evaluated``: the loss of
    another batch after them, with nothing dropped."""

    figures: list[dict[str, float]]
    counts: list[Any]  # expert counts [L, E] and dropped choices of each step
    gradients: list[dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    evaluated: float


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility, scale: float
) -> torch.Tensor:
    """Attention as it is defined, with a mask of all queries and keys. See `models.attention.core.Attend`."""
    index = torch.arange(q.shape[1], device=q.device)
    sees = (index <= index[:, None])[None]
    if visible.starts is not None:
        sees = sees & (index >= visible.starts[:, :, None])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(~sees[:, None], float("-inf")).softmax(-1), v)


def _balance(
    config: RunConfig, router: RouterStatistics, lengths: torch.Tensor, ranks: int, seen: torch.Tensor | None
) -> torch.Tensor:
    """The balance loss of the micro-batches that ``ranks`` data-parallel ranks run at the same time, times their tokens.
    ``lengths [rows]``: tokens of each row without padding. ``seen [L, E]``: choices of the global batch up to and including
    these micro-batches."""
    experts, top_k = config.model.num_experts, config.model.num_experts_per_tok
    layers, rows = router.counts.shape[:2]
    total = torch.zeros((), dtype=torch.float64)
    size = {"sequence": 1, "global_batch": rows}.get(config.balance.scope, rows // ranks)
    for begin in range(0, rows, size):
        counts = router.counts[:, begin : begin + size].sum(1).double()
        probs = router.prob_sum[:, begin : begin + size].sum(1)
        tokens = int(lengths[begin : begin + size].sum())
        if tokens == 0:
            continue
        if config.balance.scope == "huggingface":
            share = counts.sum(0) / (layers * tokens)
            total = total + experts * (share * probs.sum(0) / (layers * tokens)).sum() * tokens
            continue
        if config.balance.scope == "global_batch":
            assert seen is not None
            counts = seen.double()
        share = counts / (counts[0].sum() / top_k) / top_k
        for layer in range(layers):
            total = total + experts * (share[layer] * probs[layer] / tokens).sum() * tokens
    return total


def _losses(
    config: RunConfig, model: DecoderLM, batch: dict[str, torch.Tensor], ranks: int, probe: bool
) -> dict[str, Any]:
    """The mean losses of a global batch, differentiable, and its counts."""
    rows, rows_at_once = batch["labels"].shape[0], config.training.micro_batch_size * ranks
    count = rows if probe else (batch["labels"] >= 0).sum()
    lengths = batch.get("counted", torch.ones_like(batch["labels"])).sum(1)
    loss = likelihood = balance = z = torch.zeros((), dtype=torch.float64)
    counts, dropped = None, 0
    answers: list[Answer] = []
    for begin in range(0, rows, rows_at_once):
        part = {name: tensor[begin : begin + rows_at_once] for name, tensor in batch.items()}
        labels = part["labels"]
        if config.objective.kind != "likelihood":
            states, router = (together if config.balance.capacity_factor else alone)(model, part)
            answers += answers_of(part, states, model)
        else:
            starts = part.get("document_starts")
            hidden, router = model.hidden_states(part["input_ids"], part.get("position_ids"), starts)
            logits = hidden @ model.head_weight.T
            if probe:
                part_loss, part_likelihood = probe_loss(logits, part)
                loss, likelihood = loss + part_loss, likelihood + part_likelihood.detach()
            else:
                loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        if router is not None:
            chosen = router.counts.sum(1)
            counts = chosen if counts is None else counts + chosen
            dropped += int(router.dropped.sum())
            balance = balance + _balance(config, router, lengths[begin : begin + rows_at_once], ranks, counts)
            z = z + router.z_sum.sum()
    mean, metrics = loss / count, {"log_likelihood": float(likelihood) / rows} if probe else {}
    if answers:
        mean, metrics = plain_loss(config.objective, answers)
    tokens = lengths.sum()
    return {
        "loss": mean,
        "metrics": metrics,
        "balance": balance / tokens,
        "z": z / tokens,
        "counts": counts,
        "dropped": dropped,
    }


def reference_model(config: RunConfig) -> DecoderLM:
    """The model that the reference begins with: the recipe's, with plain attention and mixtures of experts, and with norms
    and biases drawn too."""
    model = build_model(config.model, config.seed, torch.float64).train()
    use_plain_moe(model)
    for module in model.modules():
        if isinstance(module, MoE):
            module.capacity_factor = config.balance.capacity_factor
        elif isinstance(module, Attention):
            module.attend = plain_attention
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (value := drawn_value(name, tensor.shape, config.seed)) is not None:
            tensor.data.copy_(value)
    return model


def _nudge(model: DecoderLM) -> None:
    """Change about two thirds of the weights in their last digit."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.finfo(torch.float64).eps
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + unit * torch.randint(-1, 2, parameter.shape, generator=generator).double())


def _adamw(config: RunConfig, named: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    parameters = list(named.values())
    decay = config.optimizer.weight_decay
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )


def train_reference(
    config: RunConfig, ranks: int, steps: int | None = None, probe: bool = False, nudged: bool = False
) -> Trajectory:
    """Train ``steps`` steps (None: all). ``ranks``: data-parallel size of the layout to compare with. It decides which
    micro-batches run at the same time, which matters because global-batch balancing counts all micro-batches so far.
    ``nudged``: from weights that differ in their last digit, which shows how large a difference rounding alone makes."""
    steps = config.train_steps if steps is None else steps
    assert steps <= config.train_steps, f"{steps} steps of a run of {config.train_steps}"
    model = reference_model(config)
    if nudged:
        _nudge(model)
    named = dict(model.named_parameters())
    optimizer = _adamw(config, named)
    figures, gradients, counts = [], [], []
    layers = max(1, len(config.model.moe_layers))
    for step in range(steps):
        means = _losses(config, model, global_batch(config, step), ranks, probe)
        balance = config.balance
        weight = 0.0 if balance.scope == "none" else balance.coefficient
        total = means["loss"] + weight * means["balance"] + balance.z_loss_coefficient * means["z"]
        optimizer.zero_grad()
        total.backward()
        gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        norm = torch.cat([g.flatten() for g in gradients[-1].values()]).norm().item()
        limit = config.optimizer.clip_grad_norm
        if limit and norm > limit:
            for p in named.values():
                if p.grad is not None:
                    p.grad *= limit / norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        per_layer = 1 if balance.scope == "huggingface" else layers
        figures.append(
            {
                "loss": means["loss"].item(),
                "balance loss": means["balance"].item() / per_layer,
                "z-loss": means["z"].item() / layers,
                "gradient norm": norm,
                **means["metrics"],
            }
        )
        counts.append((None if means["counts"] is None else means["counts"].tolist(), means["dropped"]))
        if balance.bias_update_rate:
            load = means["counts"].double()
            routers = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]
            for router, row in zip(routers, load, strict=True):
                router.expert_bias += balance.bias_update_rate * (row.mean() - row).sign().float()
    with torch.no_grad():
        evaluated = _losses(config, model.eval(), global_batch(config, steps), ranks, probe)["loss"]
    return Trajectory(
        figures=figures,
        counts=counts,
        gradients=gradients,
        parameters={name: p.detach() for name, p in named.items()},
        biases=dict(model.named_buffers()),
        evaluated=float(evaluated),
    )

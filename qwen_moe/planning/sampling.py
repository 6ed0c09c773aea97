"""Predicts the time and the cache of sampling an episode's answers, which a run with objective grpo learns from.

Reading prompts is bound by FLOPs. Every new token of a batch of answers reads the weights once, those experts that some
answer takes, and the cache of all its answers; a batch goes on until its longest answer ends, so these figures are those of
answers of the full length. Pipeline stages take turns, and the ranks of cp sample the same answers.

Nothing of this was measured on a GPU. The constants are those of a step's time (`hardware.Efficiency`, `software`).
"""

import math
from dataclasses import dataclass
from typing import Self

from qwen_moe.config import RunConfig
from qwen_moe.models.flops import flops_per_token
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.rates import BF16
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.planning.times import StepTime
from qwen_moe.sharding.build import DTYPES
from qwen_moe.sharding.layout import RunLayout

_CACHED = 1 << 20  # tokens of a batch: the sampler's limit (`generation.engine.Limits`)
_DRAWN_BYTES = 50  # that drawing a token moves for each logit: shift, exp, widen, cumulate


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a data-parallel group samples in an episode. ``prompts``: of this group, with ``samples`` answers each of
    ``new_tokens`` tokens; ``prompt_tokens``: of the longest that the rows of an update have room for. ``at_once``: prompts
    that are continued together."""

    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    at_once: int

    @classmethod
    def of(cls, config: RunConfig, dp: int) -> Self:
        """Of a run with the section rollout."""
        rollout = config.rollout
        assert rollout is not None
        # An update's answers fit into its rows (`training.queries`), which limits prompts, whose file is not read here.
        per_row = -(-rollout.queries_per_update * rollout.samples // config.training.global_batch_size)
        prompt = max(1, config.data.sequence_length // per_row - rollout.max_new_tokens)
        prompts = -(-rollout.queries_per_episode // dp)
        each = prompt + rollout.samples * rollout.max_new_tokens
        return cls(
            prompts=prompts,
            samples=rollout.samples,
            prompt_tokens=prompt,
            new_tokens=rollout.max_new_tokens,
            at_once=max(1, min(prompts, rollout.batch // rollout.samples, _CACHED // each)),
        )

    @property
    def batches(self) -> int:
        return -(-self.prompts // self.at_once)

    @property
    def answers(self) -> int:
        """Those of a batch."""
        return self.at_once * self.samples


def samples_itself(config: RunConfig) -> bool:
    """Whether the GPUs that train sample, too."""
    return config.rollout is not None and config.rollout.server is None


def cache_bytes(config: RunConfig, choice: Choice, dp: int, layers: int) -> float:
    """The cache of a rank with ``layers`` layers: keys and values of prompts, which answers share, and of answers."""
    work, model = Workload.of(config, dp), config.model
    tokens = work.at_once * (work.prompt_tokens + work.samples * work.new_tokens)
    heads = max(1, model.num_key_value_heads // choice.tp)
    return float(2 * tokens * heads * model.head_dim * layers * DTYPES[choice.precision].itemsize)


@dataclass(frozen=True, kw_only=True)
class SamplingTime:
    """Seconds of an episode. ``weights``, ``cache``: to read them for every token; ``kernels``: to launch them, beyond
    what they compute; ``exchange``: between ranks."""

    prompts: float
    weights: float
    cache: float
    kernels: float
    exchange: float

    @property
    def total(self) -> float:
        return self.prompts + self.weights + self.cache + self.kernels + self.exchange


class SamplingModel:
    """Predicts the seconds that sampling and preparing add to the steps that ``time`` predicts."""

    def __init__(self, config: RunConfig, time: StepTimeModel) -> None:
        self.config, self.model, self.time = config, config.model, time
        gpu = time.gpu
        self._flops = gpu.peak_tflops["bf16"] * 1e12 * gpu.efficiency.gemm

    def of_episode(self, choice: Choice, layout: RunLayout) -> SamplingTime | None:
        """Of one episode; None where the GPUs do not sample."""
        if not samples_itself(self.config):
            return None
        work = Workload.of(self.config, layout.layout.dp)
        moe = len(self.model.moe_layers)
        steps = work.batches * work.new_tokens
        parts = [0.0] * 4
        for kind, times in ((True, moe), (False, self.model.num_hidden_layers - moe)):
            if times:
                of_layer = self._layer(choice, layout, work, kind)
                parts = [part + times * one for part, one in zip(parts, of_layer, strict=True)]
        weights, cache, kernels, exchange = parts
        return SamplingTime(
            prompts=self._reading(choice, work),
            weights=steps * (weights + self._head(choice, work)),
            cache=steps * cache,
            kernels=steps * kernels,
            exchange=steps * (exchange + self._messages(choice, layout, work)),
        )

    def preparing(self, choice: Choice, step: StepTime) -> float:
        """Log-probabilities of an update's answers before it, of the present weights and of a reference: forward passes."""
        rollout, objective = self.config.rollout, self.config.objective
        if rollout is None:
            return 0.0
        passes = (rollout.old_log_probs == "trainer") + (objective.policy.kl != "none")
        both = step.compute + step.tp + step.cp + step.ep + step.pp + step.bubble + step.imbalance
        return passes * both / (4 if choice.recompute == "full" else 3)

    def _reading(self, choice: Choice, work: Workload) -> float:
        found = flops_per_token(self.model, work.prompt_tokens)
        tokens = work.prompts * work.prompt_tokens
        return tokens * (found.forward - found.head) / choice.tp / self._flops

    def _layer(self, choice: Choice, layout: RunLayout, work: Workload, moe: bool) -> tuple[float, float, float, float]:
        """(weights, cache, kernels, exchange) of a layer for one token of every answer of a batch."""
        m, rows, memory = self.model, work.answers, self.time.rates.memory
        units = self.time.shares.layer(layout.layout, moe)
        dense = units[0].whole
        weights = max(dense * BF16 / memory, 2 * dense * rows / self._flops)
        exchange = self.time.tp_seconds(choice.tp, rows, 4)
        if moe:
            ranks = choice.ep * choice.etp
            met = rows * max(1.0, ranks / (choice.tp * choice.cp))  # answers of all ranks that exchange tokens
            share = 1 - (1 - m.num_experts_per_tok / m.num_experts) ** met
            flops = 6 * rows / choice.tp * m.num_experts_per_tok * m.hidden_size * m.moe_intermediate_size
            weights += max(share * units[1].whole * BF16 / memory, flops / self._flops)
            sent = rows / choice.tp * m.num_experts_per_tok * choice.etp
            exchange += 2 * self.time.all_to_all(sent, choice.ep, choice.etp)
        heads = max(1, m.num_key_value_heads // choice.tp)
        seen = work.at_once * (work.prompt_tokens + work.samples * (work.new_tokens + 1) / 2)
        cache = 2 * seen * heads * m.head_dim * BF16 / memory
        count = (self.time.software.moe_kernels if moe else self.time.software.dense_kernels) / 3  # those of forward
        launch = count * self.time.gpu.kernel_launch_us * 1e-6
        return weights, cache, max(0.0, launch - weights - cache), exchange

    def _head(self, choice: Choice, work: Workload) -> float:
        elements = self.model.vocab_size * self.model.hidden_size / choice.tp
        drawn = work.answers * self.model.vocab_size * _DRAWN_BYTES / self.time.rates.memory
        return max(elements * BF16 / self.time.rates.memory, 2 * elements * work.answers / self._flops) + drawn

    def _messages(self, choice: Choice, layout: RunLayout, work: Workload) -> float:
        """Hidden states from stage to stage, and the tokens that the last stage has drawn to all."""
        if choice.pp == 1:
            return 0.0
        rates, stride = self.time.rates, layout.layout.stage_size
        stages = choice.pp * layout.per_rank
        bytes_ = work.answers / choice.tp * self.model.hidden_size * BF16
        one = bytes_ / rates.group_rate(2, stride) + rates.latency(2, stride)
        return (stages - 1) * one + math.ceil(math.log2(choice.pp)) * rates.latency(choice.pp, stride)

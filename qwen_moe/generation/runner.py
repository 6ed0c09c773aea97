"""Who computes logits for generation: the whole model on one device here, a model split over ranks in `ranks`.

Shapes: N new tokens of any number of sequences, n of them whose logits are wanted, V vocabulary; of routing, see `routing`.
"""

from typing import Protocol

import torch

from parallel.gemm import linear
from qwen_moe.generation.cache import SequenceCache
from qwen_moe.generation.likelihood import of_labels
from qwen_moe.generation.routing import experts_of_pass
from qwen_moe.generation.step import CompiledStep
from qwen_moe.models.attention.cache import Cache
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.ops.compiled import with_compiled_kernels


class Runner(Protocol):
    """Runs the model, which may be split over ranks."""

    device: torch.device
    dtype: torch.dtype
    first_head: int  # the number in the model of this rank's first query head

    def logits(
        self, ids: torch.Tensor, cache: SequenceCache, wanted: torch.Tensor, experts: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """``ids [N]`` -> logits ``[len(wanted), V]`` of the tokens with the indices ``wanted``. Where V is 0, another rank
        has them. ``experts`` receives those of all tokens in the MoE layers of this rank, ``[N, l, K]``."""

    def log_probs(
        self, ids: torch.Tensor, cache: Cache, wanted: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the token ``labels[i]`` after the token with the index ``wanted[i]`` of ``ids [N]``: its log-probability, and 1
        where no token is more likely, else 0. ``[n]`` each, on every rank of a pipeline."""

    def of_all_layers(self, experts: torch.Tensor) -> torch.Tensor:
        """``[n, l, K] -> [n, L, K]``: the experts of tokens in the whole model. All ranks of a pipeline call it."""

    def share(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` each, as the rank that has the logits drew them."""

    def finish(self) -> None:
        """No further call will come from this rank."""


class LocalRunner:
    """The whole model on one device. ``compiled``: new tokens are read by a `CompiledStep`, other passes with compiled
    elementwise chains."""

    def __init__(self, model: DecoderLM, *, compiled: bool = False) -> None:
        self.model, self.first_head = model, 0
        self.device, self.dtype = model.head_weight.device, model.head_weight.dtype
        self._step = CompiledStep(model) if compiled else None

    @torch.no_grad()
    def logits(
        self, ids: torch.Tensor, cache: SequenceCache, wanted: torch.Tensor, experts: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        some = wanted if len(wanted) < len(ids) else None
        chosen: list[torch.Tensor] | None = None if experts is None else []
        if some is None and self._step is not None and self._step.reads(cache, len(ids)):
            states = self._step.read(ids, cache, chosen)
        else:
            states = self._read(ids, cache, some, chosen)
        if experts is not None and chosen is not None:
            experts.append(experts_of_pass(self.model, chosen, wanted, len(ids)))
        return linear(states, self.model.head_weight)

    @torch.no_grad()
    def log_probs(
        self, ids: torch.Tensor, cache: Cache, wanted: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = self._read(ids, cache, wanted if len(wanted) < len(ids) else None, None)
        return of_labels(states, labels, lambda rows: linear(rows, self.model.head_weight))

    def _read(
        self, ids: torch.Tensor, cache: Cache, wanted: torch.Tensor | None, chosen: list[torch.Tensor] | None
    ) -> torch.Tensor:
        with with_compiled_kernels(self._step is not None):
            return self.model.read(ids.unsqueeze(0), cache, wanted, chosen)[0]

    def of_all_layers(self, experts: torch.Tensor) -> torch.Tensor:
        return experts

    def share(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, log_probs

    def finish(self) -> None:
        pass

"""How the next token is drawn from the model's logits. Shapes: N sequences, V vocabulary."""

import hashlib
from dataclasses import dataclass, field

import torch

from qwen_moe.config.fields import LARGEST
from qwen_moe.errors import UserError

_CANDIDATES = 1024  # tokens that are sorted first: the nucleus hardly ever holds more


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a text. Raises UserError if a value is out of range.

    The rules apply in this order, which is that of transformers: ``repetition_penalty`` (arXiv 1909.05858) divides the
    positive logits of tokens that occurred in the prompt or the answer and multiplies the negative ones; ``temperature``, 0
    for greedy; ``top_k`` most likely tokens, 0 for all; ``top_p``, the nucleus (arXiv 1904.09751); ``min_p``
    (arXiv 2407.01082), tokens at least that share as likely as the most likely one. ``samples``: answers per prompt.
    ``stop``: an answer ends before the first of these strings.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    samples: int = 1
    stop: tuple[str, ...] = field(default=())
    seed: int = 0

    def __post_init__(self) -> None:
        self._need(self.max_new_tokens >= 1, "max_new_tokens", "a positive number")
        self._need(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or a positive number")
        self._need(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        self._need(self.top_k >= 0, "top_k", "0 (all tokens) or a positive number")
        self._need(0 <= self.min_p < 1, "min_p", "a number from 0 to below 1")
        self._need(0 < self.repetition_penalty < float("inf"), "repetition_penalty", "a positive number (1 for none)")
        self._need(self.samples >= 1, "samples", "a positive number")
        self._need(all(self.stop), "stop", "strings that are not empty")
        if not 0 <= self.seed <= LARGEST:
            raise UserError(f"seed is {self.seed:.10g}: give a whole number from 0 to 2^63 - 1")

    def _need(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}: give {expected}")


def uniforms(seed: int, prompt: int, sample: int) -> torch.Generator:
    """The random numbers of one answer. They depend on nothing else, so that it makes no difference in which batch, and on
    which rank or device, an answer is drawn."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def penalized(logits: torch.Tensor, occurred: torch.Tensor, penalty: float) -> torch.Tensor:
    """``logits [N, V]`` with a repetition penalty on the tokens that ``occurred [N, V]``."""
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(
    logits: torch.Tensor, sampling: Sampling, chance: torch.Tensor, occurred: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of ``logits [N, V]``, and its log-probability: ``[N]`` each.

    ``chance [N]`` float64: uniform numbers in [0, 1) that decide. ``occurred [N, V]``: the tokens to which the repetition
    penalty applies. The log-probability is the model's own at ``temperature`` (at temperature 0, at 1), before tokens are
    left out or penalized: this is what training compares with. It is NaN where logits are NaN or infinite.
    """
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    own = _tempered(logits, sampling.temperature or 1.0)
    scores = own
    if occurred is not None:
        scores = _tempered(penalized(logits, occurred, sampling.repetition_penalty), sampling.temperature or 1.0)
    token = scores.argmax(-1) if sampling.temperature == 0 else _choose(scores, sampling, chance)
    return token, own.gather(-1, token.unsqueeze(-1)).squeeze(-1) - own.logsumexp(-1)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits over the temperature, the largest of a row at 0: dividing by a temperature near 0 can then overflow only to
    -inf, a probability of 0."""
    below = logits - logits.amax(-1, keepdim=True)
    return below if temperature == 1 else (below.double() / temperature).to(logits.dtype)


def _choose(scores: torch.Tensor, sampling: Sampling, chance: torch.Tensor) -> torch.Tensor:
    if sampling.top_k == 0 and sampling.top_p == 1:
        kept = scores.exp().double()
        if sampling.min_p:
            kept = kept.masked_fill(kept < sampling.min_p, 0)  # the most likely token has 1
        return _invert(kept, chance)
    vocabulary = scores.shape[-1]
    first = min(vocabulary, sampling.top_k or _CANDIDATES)
    best, order = scores.topk(first, sorted=True)
    kept = best.exp().double()
    total = kept.sum(-1) if sampling.top_k else scores.exp().sum(-1, dtype=torch.float64)
    if not sampling.top_k and first < vocabulary and bool((kept.sum(-1) < sampling.top_p * total).any()):
        best, order = scores.sort(dim=-1, descending=True)
        kept = best.exp().double()
    # Keep a token if those before it have not yet reached top_p.
    before = kept.cumsum(-1) - kept
    beyond = before >= sampling.top_p * total.unsqueeze(-1)
    kept = kept.masked_fill(beyond | (kept < sampling.min_p), 0)
    return order.gather(-1, _invert(kept, chance).unsqueeze(-1)).squeeze(-1)


def _invert(weights: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The index whose share of ``weights [N, K]`` (not normalized, float64) holds ``chance [N]`` of their sum; any index
    of a row that has NaN."""
    cumulative = weights.cumsum(-1)
    wanted = chance.to(weights.device).unsqueeze(-1) * cumulative[..., -1:]
    found = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    # Rounding may reach past the last token that has weight, and no number is above NaN.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).squeeze(-1)
    return torch.minimum(found, last).clamp_max(weights.shape[-1] - 1)

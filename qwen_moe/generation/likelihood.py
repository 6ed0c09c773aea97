"""How likely given continuations are: many texts in one forward pass, without padding and without a cache that stays.

Shapes: N tokens of a pass, n of them whose next token is scored, H query heads, G key/value heads, C head dim, D hidden,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch

from launchers.counted import counted
from parallel.gemm import widens
from qwen_moe.errors import UserError
from qwen_moe.generation.whole import attend_whole
from qwen_moe.models.attention.reader import Reader

_ROWS = 256  # of logits, which are in memory at a time


@dataclass(frozen=True)
class ScoredText:
    """Token ids, of which the last ``scored`` are scored: at least one, and not the first."""

    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Likelihood:
    """``log_prob``: of all scored tokens together, in nats. ``greedy``: whether greedy decoding would give them."""

    log_prob: float
    greedy: bool


def check_text(text: ScoredText, vocabulary: int, longest: int) -> None:
    """Raise UserError unless a model of ``vocabulary`` tokens reads ``text``, at most ``longest`` before the last token."""
    assert 0 < text.scored < len(text.tokens), f"{text.scored} of {len(text.tokens)} tokens are scored"
    smallest, largest = min(text.tokens), max(text.tokens)
    if smallest < 0 or largest >= vocabulary:
        raise UserError(
            f"a text has token {largest if largest >= vocabulary else smallest} but the model's vocabulary has "
            f"{vocabulary}: the tokenizer belongs to another model"
        )
    if len(text.tokens) - 1 > longest:
        raise UserError(
            f"a text of {counted(len(text.tokens) - 1, 'token')} is longer than the {longest} the model reads: shorten it"
        )


def in_passes(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which texts of ``lengths`` are read together, the longest first: at most ``limit`` tokens, unless one text has
    more."""
    found: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] <= room and found:
            found[-1].append(i)
        else:
            found.append([i])
            room = limit
        room -= lengths[i]
    return found


class TextsOfPass:
    """The texts of one forward pass, each of which attends to itself. A `qwen_moe.models.attention.cache.Cache`. The last
    token of a text is not read, for nothing follows it. In ``last_layer``, the last one of the model, only the tokens before
    scored ones matter, so the attention of others is left out (0)."""

    def __init__(self, texts: Sequence[ScoredText], readers: Sequence[Reader], last_layer: int) -> None:
        self._texts, self._readers, self._last_layer = texts, readers, last_layer
        self._ends = list(accumulate((len(text.tokens) - 1 for text in texts), initial=0))
        self.ids = [token for text in texts for token in text.tokens[:-1]]
        self.wanted = [
            i for text, end in zip(texts, self._ends[1:], strict=True) for i in range(end - text.scored, end)
        ]
        self.labels = [token for text in texts for token in text.tokens[-text.scored :]]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted_only: bool) -> torch.Tensor:
        """See `Cache`. With ``wanted_only``, ``q`` holds the tokens before scored ones, which end each text."""
        dtype = q.dtype
        if widens(k):
            q, k, v = q.float(), k.float(), v.float()
        y = torch.zeros_like(q)  # what follows the texts is padding
        if not wanted_only and layer != self._last_layer:
            for reader, group in groupby(zip(self._readers, pairwise(self._ends), strict=True), lambda pair: pair[0]):
                ends = [end for _, end in group]
                own, lengths = slice(ends[0][0], ends[-1][1]), [end - begin for begin, end in ends]
                y[0, own], _ = attend_whole(reader, layer, q[0, own], k[0, own], v[0, own], lengths)
            return y.to(dtype)
        asked = 0
        for text, reader, (begin, end) in zip(self._texts, self._readers, pairwise(self._ends), strict=True):
            own, first = slice(begin, end), end - begin - text.scored
            place = asked if wanted_only else begin + first
            queries = slice(place, place + text.scored)
            asked += text.scored
            y[:, queries] = reader.attend(layer, q[:, queries], reader.keys(k[:, own], 0), v[:, own], first)
        return y.to(dtype)

    def split(self, log_probs: torch.Tensor, best: torch.Tensor) -> list[Likelihood]:
        """From the log-probabilities of labels and whether each is the most likely token, ``[n]`` each, to texts."""
        sizes = [text.scored for text in self._texts]
        if not bool(log_probs.isfinite().all()):
            raise UserError(
                "the model's outputs are NaN or infinite: its weights are damaged, or it needs a wider dtype (--dtype fp32)"
            )
        parts = zip(log_probs.cpu().split(sizes), best.cpu().split(sizes), strict=True)
        return [Likelihood(float(of_text.sum()), bool(right.all())) for of_text, right in parts]


def of_labels(
    states: torch.Tensor, labels: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of ``labels [n]``, float32 (float64 of a model in float64), and 1 where the label is the most likely
    token, else 0: ``[n]`` each. ``head`` makes logits ``[., V]`` of some rows of ``states [n, D]``."""
    log_probs, best = [], []
    for rows, wanted in zip(states.split(_ROWS), labels.split(_ROWS), strict=True):
        logits = head(rows)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_probs.append(logits.log_softmax(-1, dtype=wide).gather(1, wanted.unsqueeze(1)).squeeze(1))
        best.append((logits.argmax(-1) == wanted).long())
    return torch.cat(log_probs), torch.cat(best)

"""A reward model that scores conversations, for a command or for training that asks in process.

Conversations are read as training reads them: several in one row, each a document of its own, without padding. So there is
no padding token to look for, and a score does not depend on what else is read, except for rounding: a matmul of other rows
may add in another order. Conversations that are read one at a time (``batch_tokens`` 1) have the same bits always.
Shapes: N conversations, C criteria.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch

from launchers.counted import counted
from qwen_moe.checkpoint.huggingface.convert import Weights, open_weights, read_model
from qwen_moe.checkpoint.manifest import CheckpointDamaged
from qwen_moe.checkpoint.resolve import check_exists
from qwen_moe.checkpoint.train_state import TRAIN_STATE, read_train_state
from qwen_moe.errors import UserError
from qwen_moe.models.decoder import DecoderLM

BATCH_TOKENS = 16384


class ScoringModel:
    """``weights``: how much each criterion counts in `weighted`, by default all the same. ``batch_tokens``: the most tokens
    that are read at once, unless one conversation has more."""

    def __init__(
        self, model: DecoderLM, weights: Sequence[float] | None = None, *, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self.criteria = model.config.criteria
        if not self.criteria:
            raise ValueError("the model has no criteria: it is a language model")
        self.weights = torch.tensor([1.0] * len(self.criteria) if weights is None else weights, dtype=torch.float64)
        assert len(self.weights) == len(self.criteria)
        self._model, self._batch_tokens = model.eval(), batch_tokens

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Self:
        """The reward model of a checkpoint, a run or a Hugging Face directory, on ``device`` (by default the GPU if there is
        one). The weights of the criteria are those of the run that trained it. ``dtype`` None: as in `from_pretrained`.
        Raises UserError for a language model."""
        opened = open_reward_model(Path(directory))
        model = read_model(opened, dtype, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, trained_weights(opened), batch_tokens=batch_tokens)

    @property
    def longest(self) -> int:
        """The most tokens of a conversation."""
        return self._model.config.trainable_length

    def check(self, tokens: Sequence[int], what: str = "the conversation") -> None:
        """Raise UserError, beginning with ``what``, for tokens that the model cannot read."""
        check_tokens(tokens, self._model.config.vocab_size, self.longest, what)

    @torch.no_grad()
    def scores(
        self,
        conversations: Sequence[Sequence[int]],
        done: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """The scores ``[N, C]`` at the last token of each of ``conversations`` (token ids), on the CPU: float32, or float64
        of a model in float64. ``done(i, scores [C])`` is called as soon as those of conversation i are known.

        Raises UserError for conversations that the model cannot read, before any is read, and for scores that are NaN or
        infinite.
        """
        for number, tokens in enumerate(conversations):
            self.check(tokens, f"conversation {number}")
        found: dict[int, torch.Tensor] = {}
        for batch in self._batches([len(tokens) for tokens in conversations]):
            scores = self._read([conversations[i] for i in batch])
            if not bool(scores.isfinite().all()):
                raise UserError(
                    "scores are NaN or infinite: the model's weights are damaged, or it needs a wider dtype (--dtype fp32)"
                )
            for i, of_one in zip(batch, scores, strict=True):
                found[i] = of_one
                if done is not None:
                    done(i, of_one)
        if not found:
            return torch.zeros(0, len(self.criteria))
        return torch.stack([found[i] for i in range(len(conversations))])

    def weighted_by(self, weights: Sequence[float]) -> Self:
        """The same model with other weights."""
        return type(self)(self._model, weights, batch_tokens=self._batch_tokens)

    def weighted(self, scores: torch.Tensor) -> torch.Tensor:
        """The mean over criteria ``[...]``, float64, of ``scores [..., C]`` by their `weights`."""
        return scores.double() @ self.weights / self.weights.sum()

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Conversations that are read together, in order."""
        batch: list[int] = []
        total = 0
        for i, length in enumerate(lengths):
            if batch and total + length > self._batch_tokens:
                yield batch
                batch, total = [], 0
            batch.append(i)
            total += length
        if batch:
            yield batch

    def _read(self, conversations: Sequence[Sequence[int]]) -> torch.Tensor:
        device = self._model.score.weight.device
        lengths = torch.tensor([len(tokens) for tokens in conversations])
        ends = lengths.cumsum(0)
        starts = (ends - lengths).repeat_interleave(lengths)
        ids = torch.tensor([token for tokens in conversations for token in tokens])
        positions = torch.arange(len(ids)) - starts
        fields = (field.unsqueeze(0).to(device) for field in (ids, positions, starts))
        states, _ = self._model.hidden_states(*fields)
        return self._model.scores(states[0, (ends - 1).to(device)]).cpu()


def open_reward_model(directory: Path) -> Weights:
    """`open_weights`. Raises UserError for a language model."""
    check_exists(directory)
    opened = open_weights(directory)
    if not opened.config.criteria:
        raise UserError(
            f"{directory} is a language model, which has no scores: give a reward model, trained with objective.kind "
            "reward_model"
        )
    return opened


def trained_weights(opened: Weights) -> tuple[float, ...] | None:
    """The weights of the criteria in the run that trained the model; None where no run did, as in a converted directory."""
    if not (opened.directory / TRAIN_STATE).is_file():
        return None
    try:
        reward = read_train_state(opened.directory).settings["objective"]["reward"]
        criteria, weights = tuple(reward["criteria"]), tuple(float(weight) for weight in reward["weights"])
    except (CheckpointDamaged, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{opened.directory} does not say how its criteria are weighted: {error!r}") from None
    return weights if criteria == opened.config.criteria and len(weights) == len(criteria) else None


def check_tokens(tokens: Sequence[int], vocab_size: int, longest: int, what: str) -> None:
    """Raise UserError, beginning with ``what``, unless a model can read ``tokens``."""
    if not len(tokens):
        raise UserError(f"{what} is empty: give at least one token")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = max(tokens) if max(tokens) >= vocab_size else min(tokens)
        raise UserError(
            f"{what} has token {wrong} but the model's vocabulary has {vocab_size}: the tokenizer belongs to another model"
        )
    if len(tokens) > longest:
        raise UserError(
            f"{what} has {counted(len(tokens), 'token')}, more than the {longest:,} that the model reads: shorten it"
        )

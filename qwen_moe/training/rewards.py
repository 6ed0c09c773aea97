"""The rewards of a run's own samples: verifiers and functions, and a reward model. Only rank 0 computes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_moe.checkpoint.fingerprint import fingerprint, tokenizer_fingerprint
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.generation.tokenizer import tokenizer_folder
from qwen_moe.rollout.queries import Query
from qwen_moe.rollout.rewards import Item, Rewarder
from qwen_moe.scoring.model import ScoringModel, open_reward_model
from qwen_moe.training.queries import reward_settings
from qwen_moe.training.responses import Response

MODEL = "reward_model"


class Rewards:
    """The rewards that `rollout` names. ``tokenizer``: the run's, which the reward model must have too. Raises UserError."""

    def __init__(self, config: RunConfig, tokenizer: Path) -> None:
        assert config.rollout is not None
        self._weight, directory = config.rollout.reward_model_weight, config.rollout.reward_model
        self.model_files = ""  # a hash of the reward model's files; empty without one
        self._model: ScoringModel | None = None
        if directory is not None:
            own, other = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(_folder(directory))
            if own != other:
                raise UserError(
                    f"rollout.reward_model {directory} was trained with another tokenizer than {tokenizer}: the same ids "
                    "mean other text; give a reward model of the same tokenizer"
                )
            self._model = ScoringModel.load(directory)
            self.model_files = fingerprint(open_reward_model(directory).directory)
        settings = reward_settings(config)
        self._rewarder = None if settings is None else Rewarder(settings)

    def close(self) -> None:
        if self._rewarder is not None:
            self._rewarder.close()

    def import_changed(self) -> None:
        """Use the files of functions as they are now. Raises UserError."""
        if self._rewarder is not None:
            self._rewarder.import_changed()

    def identity(self) -> list[Any]:
        """What decides the rewards."""
        return [None if self._rewarder is None else self._rewarder.identity(), self.model_files, self._weight]

    def functions(self) -> dict[str, str]:
        """A hash of the file of each reward that is a function."""
        return {} if self._rewarder is None else dict(self._rewarder.identity()["functions"])

    def score(
        self, responses: Sequence[Response], queries: Sequence[Query], texts: Sequence[str]
    ) -> tuple[list[float], list[dict[str, float]]]:
        """The reward of each response, and its parts. ``texts``: of the answers, without end tokens."""
        values = [0.0] * len(responses)
        parts: list[dict[str, float]] = [{} for _ in responses]
        if self._rewarder is not None:
            items = [
                Item(
                    prompt=queries[one.query].prompt,
                    completion=text,
                    row={"id": queries[one.query].id, **queries[one.query].values},
                    finish_reason="length" if one.truncated else "stop",
                )
                for one, text in zip(responses, texts, strict=True)
            ]
            for place, score in enumerate(self._rewarder.score(items)):
                values[place] += score.value
                parts[place] |= score.parts
        if self._model is not None:
            scores = self._model.weighted(self._model.scores([one.tokens.tolist() for one in responses]))
            for place, value in enumerate(scores.tolist()):
                values[place] += self._weight * value
                parts[place][MODEL] = value
        return values, parts


def _folder(directory: Path) -> Path:
    """The folder with the tokenizer of a checkpoint, a run or a Hugging Face directory."""
    from qwen_moe.checkpoint.huggingface.convert import open_weights

    return tokenizer_folder(open_weights(directory).directory)

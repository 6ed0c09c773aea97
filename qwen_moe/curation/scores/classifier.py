"""A small classifier of texts: hashed words to scores or to classes, by a linear map or through a hidden layer.

A folder holds ``classifier.safetensors`` and ``classifier.json``: what it predicts, its sizes, how it was trained, and its
figures on documents that it was not trained on.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import nn

from launchers.folder.atomic import replaced, write_json
from qwen_moe.config.fields import Finite, OptionalSize, PositiveFloat, Section, Size
from qwen_moe.config.load import explain
from qwen_moe.curation.scores.annotate import DOMAIN, PROBABILITY, Doc
from qwen_moe.curation.scores.features import Features, Hasher
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError

WEIGHTS, MANIFEST, FORMAT = "classifier.safetensors", "classifier.json", 1
BATCH = 512  # documents


class Shape(Section):
    """What a classifier is. ``names``: the dimensions of scores, or the classes. ``words``: of a text, at most.
    ``hidden``: 0 for a linear map. Scores are predicted as ``means + deviations * output``."""

    kind: Literal["scores", "classes"]
    names: tuple[str, ...] = Field(min_length=1)
    buckets: Size = 1 << 18
    words: Size = 4096
    hidden: OptionalSize = 32
    means: tuple[Finite, ...] = ()
    deviations: tuple[PositiveFloat, ...] = ()


class Network(nn.Module):
    """``features -> [B, len(names)]``, in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        outputs = len(shape.names)
        self.words = nn.Embedding(shape.buckets, shape.hidden or outputs)
        self.bias = nn.Parameter(torch.zeros(shape.hidden or outputs))
        self.output = nn.Linear(shape.hidden, outputs) if shape.hidden else None

    def forward(self, buckets: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.of_table(self.words.weight, buckets, offsets, weights)

    def of_table(
        self, table: torch.Tensor, buckets: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """With the rows of ``table`` in place of `words`."""
        x = F.embedding_bag(buckets, table, offsets, mode="sum", per_sample_weights=weights) + self.bias
        return x if self.output is None else self.output(F.relu(x))


def collated(features: Sequence[Features]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buckets and weights of all ``features``, one after another, and where each begins."""
    sizes = torch.tensor([0, *(len(one.buckets) for one in features)])
    buckets = torch.cat([torch.from_numpy(one.buckets) for one in features])
    weights = torch.cat([torch.from_numpy(one.weights) for one in features])
    return buckets, sizes.cumsum(0)[:-1], weights


class Classifier:
    """A trained network. ``figures``: from its manifest, for a record."""

    def __init__(self, shape: Shape, network: Network, digest: str = "", figures: dict[str, Any] | None = None) -> None:
        self.shape, self.network, self.digest, self.figures = shape, network.eval(), digest, figures or {}
        self._hasher = Hasher(shape.buckets, shape.words)

    @torch.inference_mode()
    def predict(self, features: Sequence[Features]) -> torch.Tensor:
        """Scores, or probabilities of the classes, ``[N, len(names)]``, float64."""
        found = [self._read(features[i : i + BATCH]) for i in range(0, len(features), BATCH)]
        return torch.cat(found) if found else torch.zeros(0, len(self.shape.names), dtype=torch.float64)

    def _read(self, features: Sequence[Features]) -> torch.Tensor:
        output = self.network(*collated(features)).double()
        if self.shape.kind == "classes":
            return output.softmax(1)
        return output * torch.tensor(self.shape.deviations).double() + torch.tensor(self.shape.means).double()

    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self.predict([self._hasher(text) for text in texts])

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        """Write the folder. The manifest comes last: without it there is no classifier."""
        from safetensors.torch import save

        content = save({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()})
        (folder / MANIFEST).unlink(missing_ok=True)
        with replaced(folder / WEIGHTS) as file:
            file.write(content)
        values = {"format": FORMAT, **self.shape.model_dump(mode="json"), "figures": figures}
        write_json(folder / MANIFEST, values | {"sha256": hashlib.sha256(content).hexdigest()})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises UserError for a folder that holds none, or whose files do not belong together."""
        from safetensors.torch import load

        where = folder / MANIFEST
        values = json_object(
            read_text(where, "classifier", "a folder that `qwen-moe data score --train-classifier` wrote"), str(where)
        )
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{where} is not a classifier of format {FORMAT}: train it again")
        digest, figures = values.pop("sha256", ""), values.pop("figures", {})
        try:
            shape = Shape(**values)
            content = (folder / WEIGHTS).read_bytes()
        except ValidationError as error:
            raise explain(error, str(where), whole=Shape) from None
        except FileNotFoundError:
            raise UserError(f"{folder / WEIGHTS} is missing: train the classifier again") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{folder / WEIGHTS} is not the file that {MANIFEST} describes: train the classifier again")
        with torch.device("meta"):
            network = Network(shape)
        try:
            network.load_state_dict(load(content), assign=True)
        except RuntimeError as error:
            raise UserError(f"{folder / WEIGHTS} does not fit {MANIFEST}: {str(error).splitlines()[-1]}") from None
        if shape.kind == "scores" and not len(shape.means) == len(shape.deviations) == len(shape.names):
            raise UserError(f"{where}: means and deviations must be those of {', '.join(shape.names)}")
        if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
            raise UserError(f"{folder / WEIGHTS} holds NaN or infinity: train the classifier again")
        return cls(shape, network, digest, figures)


class _Annotator:
    kind: Literal["scores", "classes"]

    def __init__(self, classifier: Classifier) -> None:
        if classifier.shape.kind != self.kind:
            raise UserError(
                f"the classifier predicts {classifier.shape.kind} ({', '.join(classifier.shape.names[:5])}), and "
                f"{self.kind} are asked for: give another"
            )
        self.classifier, self.names = classifier, classifier.shape.names

    def rows(self, documents: Sequence[Doc]) -> Iterator[list[float]]:
        yield from self.classifier.of_texts([document.text for document in documents]).tolist()


class ScoreClassifier(_Annotator):
    """Scores that a classifier predicts."""

    kind = "scores"

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        return [{"scores": dict(zip(self.names, row, strict=True))} for row in self.rows(documents)]

    def identity(self) -> dict[str, Any]:
        return {"scorer": "classifier", "classifier": self.classifier.digest, "dimensions": list(self.names)}


class DomainClassifier(_Annotator):
    """Domains that a classifier finds most likely."""

    kind = "classes"

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        best = [max(zip(row, self.names, strict=True), key=lambda one: one[0]) for row in self.rows(documents)]
        return [{DOMAIN: name, PROBABILITY: round(share, 6)} for share, name in best]

    def identity(self) -> dict[str, Any]:
        return {"domains": "classifier", "classifier": self.classifier.digest, "names": list(self.names)}

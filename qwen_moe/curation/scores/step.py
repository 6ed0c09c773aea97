"""Scores as a step of a datatrove pipeline: `ScoreStep`."""

import itertools
from collections.abc import Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep

from qwen_moe.curation.scores.annotate import ERROR, LEFT_OUT, add_metadata, check_none_failed, forget, open_cached
from qwen_moe.curation.scores.settings import DomainSettings, ScoreSettings


class AnnotateStep(PipelineStep):
    """Adds what the annotator of ``settings`` finds to the metadata of documents, and keeps every document in its place.

    Documents are handed over in blocks of ``settings.batch_documents``. What is scored with is opened by the process that
    runs the step, at its first document, and shared by the tasks that this process runs.
    """

    type = "\N{TRIANGULAR RULER} - SCORES"

    def __init__(self, settings: ScoreSettings | DomainSettings) -> None:
        super().__init__()
        self.settings = settings

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        documents = iter(data or ())
        annotator = None
        while block := list(itertools.islice(documents, self.settings.batch_documents)):
            with self.track_time("batch"):
                annotator = annotator or open_cached(self.settings.model_dump_json(), type(self.settings))
                for document in block:
                    forget(document)
                for document, found in zip(block, annotator.annotate(block), strict=True):
                    add_metadata(document, found)
                    self.stat_update("documents")
                    if LEFT_OUT in found:
                        self.stat_update("shortened")
                    if ERROR in found:
                        self.stat_update("failed")
                if getattr(self.settings, "on_failure", "skip") == "error":
                    check_none_failed(block)
            yield from block


class ScoreStep(AnnotateStep):
    """Adds metadata["scores"], a number for each dimension."""

    name = "Scores"

    def __init__(self, settings: ScoreSettings) -> None:
        super().__init__(settings)

"""Domains as a step of a datatrove pipeline: `DomainStep`."""

from qwen_moe.curation.scores.settings import DomainSettings
from qwen_moe.curation.scores.step import AnnotateStep

__all__ = ["DomainSettings", "DomainStep"]


class DomainStep(AnnotateStep):
    """Adds metadata["domain"]."""

    name = "Domains"

    def __init__(self, settings: DomainSettings) -> None:
        super().__init__(settings)

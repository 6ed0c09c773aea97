"""What curation takes from datatrove. Import this module only where the package is needed: it is in an extra."""

from datatrove.data import Document  # type: ignore[import-untyped]
from datatrove.executor.local import LocalPipelineExecutor  # type: ignore[import-untyped]
from datatrove.executor.slurm import SlurmPipelineExecutor  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep  # type: ignore[import-untyped]
from datatrove.pipeline.dedup.exact_dedup import (  # type: ignore[import-untyped]
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (  # type: ignore[import-untyped]
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (  # type: ignore[import-untyped]
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    RegexFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter  # type: ignore[import-untyped]
from datatrove.pipeline.formatters import SymbolLinesFormatter  # type: ignore[import-untyped]
from datatrove.pipeline.readers.base import BaseReader  # type: ignore[import-untyped]
from datatrove.pipeline.writers.disk_base import DiskWriter  # type: ignore[import-untyped]
from datatrove.utils.hashing import HashConfig, create_hash_func  # type: ignore[import-untyped]
from datatrove.utils.logging import logger  # type: ignore[import-untyped]
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer  # type: ignore[import-untyped]

__all__ = [
    "BaseFilter",
    "BaseReader",
    "C4ParagraphFilter",
    "C4QualityFilter",
    "DiskWriter",
    "Document",
    "ExactDedupConfig",
    "ExactDedupFilter",
    "ExactDedupSignature",
    "ExactFindDedups",
    "FineWebQualityFilter",
    "GopherQualityFilter",
    "GopherRepetitionFilter",
    "HashConfig",
    "LocalPipelineExecutor",
    "MinhashConfig",
    "MinhashDedupBuckets",
    "MinhashDedupCluster",
    "MinhashDedupFilter",
    "MinhashDedupSignature",
    "PipelineStep",
    "RegexFilter",
    "SlurmPipelineExecutor",
    "SymbolLinesFormatter",
    "WordTokenizer",
    "create_hash_func",
    "load_word_tokenizer",
    "logger",
]

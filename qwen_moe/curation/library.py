"""What curation takes from datatrove. Import this module only where the package is needed: it is in an extra."""

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    RegexFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import SymbolLinesFormatter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

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

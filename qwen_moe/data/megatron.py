"""Imports megatron-core's datasets in one place, without warnings and without the rest of megatron-core. Defines two more
datasets, of long documents only and of short documents only.

`import megatron.core` loads its tensor parallelism, its transformers and with them torch's compiler, which takes seconds in
every process. The datasets need only a logging function and a base class of it. So they are imported below packages that
are empty except for these two. Afterwards these packages are removed, and `import megatron.core` elsewhere gets the real
one.
"""

import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_CORE = "megatron.core"


def _empty_package(name: str, folder: Path) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return module


def _forget(names: set[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


@contextmanager
def _only_datasets() -> Iterator[None]:
    """Within the block, `megatron.core` is a package that runs no code of its own."""
    found = importlib.util.find_spec("megatron")
    if found is None or not found.submodule_search_locations:
        raise ImportError("megatron-core is not installed")
    folder = next(f for p in found.submodule_search_locations if (f := Path(p) / "core").is_dir())
    core, utils = _empty_package(_CORE, folder), ModuleType(f"{_CORE}.utils")
    tokenizers = _empty_package(f"{_CORE}.tokenizers", folder / "tokenizers")
    replaced = {module.__name__: module for module in (core, utils, tokenizers)}
    sys.modules.update(replaced)
    try:
        from megatron.core._rank_utils import log_single_rank
        from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

        utils.log_single_rank = log_single_rank  # type: ignore[attr-defined]
        tokenizers.MegatronTokenizerBase = MegatronTokenizerBase  # type: ignore[attr-defined]
        yield
    except BaseException:
        _forget({name for name in sys.modules if name.startswith(f"{_CORE}.")})
        raise
    finally:
        _forget(set(replaced))
        if hasattr(sys.modules.get("megatron"), "core"):
            del sys.modules["megatron"].core


def _import_datasets() -> None:
    from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset, indexed_dataset  # noqa: F401


with warnings.catch_warnings():
    # At import, megatron-core warns that Transformer Engine and Apex are missing, but its datasets use neither.
    warnings.simplefilter("ignore")
    if _CORE not in sys.modules:
        try:
            with _only_datasets():
                _import_datasets()
        except (ImportError, AttributeError, StopIteration):
            # The datasets of this version of megatron-core need more of it, so import all of it.
            pass
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

logging.getLogger("megatron").setLevel(logging.ERROR)

__all__ = [
    "BlendedMegatronDatasetBuilder",
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDatasetBuilder",
    "LongDocuments",
    "ShortDocuments",
]


class LongDocuments(GPTDataset):
    """Samples from documents of at least ``sequence_length`` tokens. megatron-core names its index files after the class."""

    def __init__(self, dataset: Any, path: Any, indices: Any, samples: Any, split: Any, config: Any) -> None:
        indices = indices[dataset.sequence_lengths[indices] >= config.sequence_length]
        super().__init__(dataset, path, indices, samples, split, config)


class ShortDocuments(GPTDataset):
    """Samples from documents of fewer than ``sequence_length`` tokens."""

    def __init__(self, dataset: Any, path: Any, indices: Any, samples: Any, split: Any, config: Any) -> None:
        indices = indices[dataset.sequence_lengths[indices] < config.sequence_length]
        super().__init__(dataset, path, indices, samples, split, config)

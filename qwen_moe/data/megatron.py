"""megatron-core's datasets, imported in one place and quietly."""

import logging
import warnings

with warnings.catch_warnings():
    # At import it warns that Transformer Engine and Apex are absent; its datasets use neither.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

logging.getLogger("megatron").setLevel(logging.ERROR)

__all__ = ["BlendedMegatronDatasetBuilder", "DType", "GPTDataset", "GPTDatasetConfig", "IndexedDatasetBuilder"]

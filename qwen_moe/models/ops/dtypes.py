"""The accumulation dtype of norms, softmax and losses."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, RoPE tables, router softmax and losses are computed for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The dtype in which sums and statistics are formed."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms, RoPE tables, router softmax and losses are computed for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32

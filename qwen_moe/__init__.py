"""Megatron-style training of Qwen Mixture-of-Experts models, the same code on a laptop's CPU and on a cluster."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qwen_moe.checkpoint.huggingface.convert import from_pretrained, save_pretrained

__all__ = ["__version__", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    # Imported lazily, so that `qwen-moe --help` and the config do not wait for torch.
    if name in ("from_pretrained", "save_pretrained"):
        from qwen_moe.checkpoint.huggingface import convert as huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module 'qwen_moe' has no attribute {name!r}")

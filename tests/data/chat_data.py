"""Files of chat data with given tokens, for tests of what reads them."""

from pathlib import Path

import numpy as np
import torch

from qwen_moe.data.content import sample_sha256, sha256
from qwen_moe.data.manifest import (
    PreparedData,
    bin_path,
    column_path,
    idx_path,
    manifest_path,
    write_manifest,
)

Document = tuple[list[int], list[int]]  # tokens, and 1 for each that is learned
END = 1


def write_chat(prefix: Path, documents: list[Document], kind: str = "chat", tokenizer: str = "t") -> Path:
    """Write what `qwen-moe data chat` would, with a manifest; token END stands for the end of a turn."""
    from qwen_moe.data.megatron import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    for tokens, _ in documents:
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))
    column = column_path(prefix, "learn")
    column.write_bytes(bytes(value for _, learn in documents for value in learn))
    prepared = PreparedData(
        documents=len(documents),
        tokens=sum(len(tokens) for tokens, _ in documents),
        text_bytes=0,
        max_token_id=max(max(tokens) for tokens, _ in documents),
        end_of_document_id=END,
        vocab_size=60_000,
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer,
        tokenizer_identity=tokenizer,
        skipped=0,
        bin_bytes=bin_path(prefix).stat().st_size,
        bin_sha256=sha256(bin_path(prefix)),
        bin_sample_sha256=sample_sha256(bin_path(prefix)),
        idx_sha256=sha256(idx_path(prefix)),
        request="",
        kind=kind,
        columns={"learn": sha256(column)},
    )
    write_manifest(manifest_path(prefix), prepared)
    return prefix

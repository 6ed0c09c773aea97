"""Trains a tokenizer on conversations, for models that begin with them."""

import sys
from collections.abc import Iterator
from pathlib import Path

from qwen_moe.data.conversations import BadRow, conversations
from qwen_moe.data.corpus import ReadCounts, read_lines
from qwen_moe.data.manifest import trained_tokenizer_path
from qwen_moe.data.prepare_chat import find_rows
from qwen_moe.data.tokenizer import check_vocabulary_size, load_tokenizer, train_tokenizer, vocabulary_size
from qwen_moe.documents import json_object
from qwen_moe.errors import UserError


def trained_chat_tokenizer(inputs: tuple[str, ...], vocab_size: int, prefix: Path) -> Path:
    """The directory of a tokenizer for the data at ``prefix``: trained on the rows of ``inputs`` unless it exists. Raises
    UserError."""
    directory = trained_tokenizer_path(prefix)
    check_vocabulary_size(vocab_size)
    if directory.is_dir():
        found = vocabulary_size(load_tokenizer(directory))
        if found != vocab_size:
            raise UserError(
                f"{directory} has {found} tokens and data.prepare.vocab_size is {vocab_size}: give another "
                "data.prepare.output, or restore the size"
            )
        return directory
    print(f"training a tokenizer of {vocab_size:,} tokens in {directory}", file=sys.stderr)
    directory.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(_texts(inputs), vocab_size, directory)
    return directory


def _texts(inputs: tuple[str, ...]) -> Iterator[str]:
    """What each message says, with its role as chat templates write it."""
    counts = ReadCounts()
    for source in find_rows(inputs).sources:
        for where, line in read_lines(source, counts):
            try:
                found = conversations(json_object(line.decode("utf-8-sig"), where))
            except (BadRow, UnicodeDecodeError) as error:
                raise UserError(f"{where}: {error}") from None
            yield from (f"{message['role']}\n{message['content'] or ''}" for one in found for message in one.messages)

"""The tokenizer and the end tokens that belong to a checkpoint, and prompts as tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError


def tokenizer_folder(directory: Path) -> Path:
    """The folder with the tokenizer of a checkpoint, run or Hugging Face directory. Raises UserError if there is none."""
    from qwen_moe.checkpoint.resolve import check_exists, side_folder

    check_exists(directory)
    folder = side_folder(directory)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{folder} has no tokenizer (no tokenizer.json or vocab.json): copy the files of the model's tokenizer there"
        )
    return folder


def end_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """End tokens, read as Hugging Face does: from generation_config.json, else config.json, else the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        values = json_object(read_text(folder / name, "the model's", "the model's own directory"), str(folder / name))
        eos = values.get("eos_token_id")
        if eos is None:
            continue
        ends = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(end, int) and not isinstance(end, bool) and 0 <= end < 2**31 for end in ends):
            raise UserError(f"{folder / name}: eos_token_id is {eos!r}, expected an id or a list of ids")
        return ends
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def text_tokens(tokenizer: Any, text: str, what: str = "the prompt") -> list[int]:
    """The tokens of a text. Raises UserError, beginning with ``what``, if it is empty or not Unicode."""
    if not text:
        raise UserError(f"{what} is empty: give some text")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{what} is not valid UTF-8 text: remove its broken characters")
    # A long text is not a mistake, about which transformers would warn.
    return tokenizer(text, verbose=False)["input_ids"]


def chat_tokens(
    tokenizer: Any, messages: Sequence[Any], what: str = "the prompt", tools: list[Any] | None = None
) -> list[int]:
    """The tokens of a conversation up to where the assistant's answer begins, by the tokenizer's chat template. ``tools``:
    JSON schemas of the functions that the assistant may call. Raises UserError, beginning with ``what``, for messages of
    another form or that the template refuses, and for tools that it leaves out."""
    text = chat_text(tokenizer, messages, what, tools=tools)
    if tools and text == chat_text(tokenizer, messages, what):
        raise UserError(f"{what}: the chat template leaves out the tools: use a template that writes them")
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def chat_text(tokenizer: Any, messages: Sequence[Any], what: str = "the prompt", **options: Any) -> str:
    """The text of which `chat_tokens` are the tokens. ``options`` are handed to the template."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template (in tokenizer_config.json or chat_template.jinja): give text "
            "without --chat, or add the template of the model"
        )
    if not messages or not all(_is_message(message) for message in messages):
        raise UserError(f'{what} must be a list of messages like {{"role": "user", "content": "..."}}')
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # a template raises what it likes
        raise UserError(f"{what} is refused by the tokenizer's chat template: {error}") from None


def _is_message(message: Any) -> bool:
    """Whether it has a role and text. A message that calls tools may have no text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))

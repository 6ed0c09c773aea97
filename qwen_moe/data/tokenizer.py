"""Trains byte-level BPE tokenizers with Qwen's pre-tokenization and control tokens, and loads any tokenizer."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from launchers.folder.atomic import replaced
from qwen_moe.data.chat_template import CHAT_TEMPLATE
from qwen_moe.errors import UserError
from qwen_moe.progress import style

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2.5's control tokens, in the order of their ids (the last ids of the vocabulary), as in its tokenizer_config.json.
# The first 14 are special (dropped by `skip_special_tokens`), the rest are plain added tokens.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
SPECIAL_COUNT = 14
END_OF_TEXT = CONTROL_TOKENS[0]

# The `Split` pattern of Qwen2's tokenizer.json.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MINIMUM_VOCABULARY = 256 + len(CONTROL_TOKENS)
# The trainer allocates memory for the requested number of tokens, and aborts the process if there is too little.
MAXIMUM_VOCABULARY = 10_000_000
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
          "special_tokens_map.json", "added_tokens.json", "generation_config.json")  # fmt: skip


def check_vocabulary_size(vocab_size: int) -> None:
    """Raises UserError for a vocabulary size that is too small or too large."""
    if vocab_size < MINIMUM_VOCABULARY:
        raise UserError(
            f"vocabulary size {vocab_size} is too small: 256 bytes and {len(CONTROL_TOKENS)} control tokens need at "
            f"least {MINIMUM_VOCABULARY}"
        )
    if vocab_size > MAXIMUM_VOCABULARY:
        raise UserError(
            f"vocabulary size {vocab_size} is too large: at most {MAXIMUM_VOCABULARY:,} (Qwen's is 151,669)"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, model_max_length: int = 32768) -> None:
    """Train on ``texts`` and write a directory that `transformers.AutoTokenizer` reads.

    ``vocab_size`` counts everything: 256 bytes, merges and the 22 control tokens, whose ids come last. The same texts
    in the same order give the same tokenizer. Raises UserError if ``vocab_size`` is below 278 or above 10 million.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    check_vocabulary_size(vocab_size)
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    wanted = vocab_size - len(CONTROL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    with _progress() as shown:
        tokenizer.train_from_iterator(_counted(texts, shown), trainer)
    reached = tokenizer.get_vocab_size()
    if reached < wanted:
        raise UserError(
            f"the text allows a vocabulary of only {reached + len(CONTROL_TOKENS)} tokens, not {vocab_size}: request "
            "that many, or give more text"
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=index < SPECIAL_COUNT, normalized=False)
            for index, token in enumerate(CONTROL_TOKENS)
        ]
    )
    _save(tokenizer, output, model_max_length)


def _progress() -> "tqdm[Any]":
    return tqdm(desc="tokenizer", unit=" characters", unit_scale=True, leave=False, delay=1.0, **style())


def _counted(texts: Iterable[str], shown: "tqdm[Any]") -> Iterator[str]:
    for text in texts:
        yield text
        shown.update(len(text))
    shown.set_postfix_str("all read; choosing tokens")


def _save(tokenizer: "Tokenizer", output: Path, model_max_length: int) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": index < SPECIAL_COUNT,
        }
        for index, token in enumerate(CONTROL_TOKENS)
    }
    settings: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(CONTROL_TOKENS[1:SPECIAL_COUNT]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    os.replace(partial, output)


def load_tokenizer(directory: Path) -> "Tokenizer":
    """The `tokenizers.Tokenizer` of a directory, set to read whole documents, and control tokens in them as plain text.

    Truncation and padding that are saved with it are switched off. Text never becomes an added token, except for added
    tokens of white space alone, which some vocabularies have for indentation.
    Raises UserError if the directory or its tokenizer.json is missing or unreadable.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        from qwen_moe.config.writers import writer

        fault = "has no tokenizer.json" if directory.is_dir() else "does not exist"
        raise UserError(
            f"tokenizer {directory} {fault}: give a directory written by `qwen-moe data prepare "
            f"--train-tokenizer` or by transformers' save_pretrained{'' if directory.is_dir() else writer(directory)}"
        )
    try:
        content = json.loads(path.read_bytes())
        # encode_special_tokens reads special added tokens as plain text.
        for token in content.get("added_tokens") or []:
            token["special"] = not token["content"].isspace()
        tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:
        raise UserError(f"{path} is not a readable tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer whose files lie in ``folder``. Raises UserError when they are damaged."""
    from transformers import AutoTokenizer

    try:
        # Never run code from the folder, and never ask whether to run it.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # for damaged files transformers raises plain Exception, KeyError, ...
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None


def end_with_turn(folder: Path, end: int) -> None:
    """Let generation with the tokenizer in ``folder`` end at token ``end``, which ends a turn, too: in its
    generation_config.json."""
    path = folder / "generation_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        given = values.get("eos_token_id")
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not a JSON object: correct it, or remove it") from None
    if given is None:
        given = read_tokenizer(folder).eos_token_id
    others = given if isinstance(given, list) else [] if given is None else [given]
    values["eos_token_id"] = [end, *(other for other in others if other != end)]
    with replaced(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def control_ids(tokenizer: "Tokenizer") -> dict[int, str]:
    """The added tokens that text must not become, by id."""
    return {
        number: token.content
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if not token.content.isspace()
    }


def end_of_document_id(tokenizer: "Tokenizer", directory: Path) -> int:
    """The id of <|endoftext|>, which ends every document. Raises UserError if the tokenizer has none."""
    found = tokenizer.token_to_id(END_OF_TEXT)
    if found is None:
        raise UserError(
            f"tokenizer {directory} has no {END_OF_TEXT} token, which ends every document: use one that has it"
        )
    return found


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """One more than the largest id: the minimum number of rows of a model's embedding."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_hash(directory: Path) -> str:
    """SHA-256 of tokenizer.json. Tokenizers with equal hashes give the same tokens."""
    return hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()


def tokenizer_identity(tokenizer: "Tokenizer") -> str:
    """A hash of everything that decides encoding and decoding. It is equal for two files of one tokenizer that differ only
    in layout, truncation, padding or the tokens added around a text, or because transformers has loaded and saved one."""
    return _identity(tokenizer, ("continuing_subword_prefix", "end_of_word_suffix"))


def tokenizer_identities(tokenizer: "Tokenizer") -> tuple[str, str]:
    """`tokenizer_identity`, and the hash that stands for it in data of earlier versions, in which an empty prefix or suffix
    of the model was not the same as none. transformers writes the first where `tokenizers` writes the second."""
    return tokenizer_identity(tokenizer), _identity(tokenizer, ())


def _identity(tokenizer: "Tokenizer", none_if_empty: tuple[str, ...]) -> str:
    content = json.loads(tokenizer.to_str())
    parts = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model", "decoder")}
    parts["model"] |= {key: None for key in none_if_empty if parts["model"].get(key) == ""}
    added = sorted((token["id"], token["content"]) for token in content.get("added_tokens") or [])
    return hashlib.sha256(json.dumps([parts, added], sort_keys=True).encode()).hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from ``source`` to ``target``, each atomically, and remove those that ``source`` lacks."""
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(source):
        return
    for name in _FILES:
        if not (source / name).is_file():
            (target / name).unlink(missing_ok=True)
            continue
        with replaced(target / name) as file:
            file.write((source / name).read_bytes())

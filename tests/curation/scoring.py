"""A small instruct model and documents for the tests of scores. Its tokenizer knows the words of the prompts."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.cli import main
from qwen_moe.curation.scores.wording import DEFAULTS, FRAMES
from qwen_moe.data.tokenizer import read_tokenizer, train_tokenizer
from qwen_moe.models.decoder import DecoderLM
from tests.models.hf_reference import draw_weights
from tests.small import small_model

VOCABULARY = 720
REACH = 512
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "water", "stone", "river", "light", "paper"]


def instruct_model(dtype: torch.dtype = torch.float64) -> DecoderLM:
    return draw_weights(small_model(vocab_size=VOCABULARY, max_position_embeddings=REACH), 5, dtype)


def save_scorer(folder: Path, dtype: torch.dtype = torch.float64, chat: bool = True) -> Path:
    """A Hugging Face directory."""
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    texts = [*WORDS, *(text for frame in FRAMES.values() for text in vars(frame).values())]
    texts += [text for by_language in DEFAULTS.values() for text in by_language.values()]
    train_tokenizer(texts, 700, tokenizer)
    read = read_tokenizer(tokenizer)
    if not chat:
        read.chat_template = None
    save_pretrained(instruct_model(dtype), folder, tokenizer=read)
    return folder


def document(number: int, words: int = 12) -> dict[str, Any]:
    text = " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(words + number % 4))
    language = ("en", "de", "fr", None)[number % 4]
    return {"text": text, "id": f"d{number}", "metadata": {} if language is None else {"language": language}}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """All documents of a folder of scores."""
    files = sorted(path for path in folder.glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def score(*arguments: object) -> int:
    return main(["data", "score", *map(str, arguments)])


@functools.cache
def planted(count: int = 1200) -> tuple[dict[str, Any], ...]:
    """Documents whose score is the number of times that some words are in them, and whose label is the rarest such word."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        picks = torch.randint(len(WORDS), (40,), generator=generator).tolist()
        words = [WORDS[pick] for pick in picks]
        score = (words.count("alpha") - words.count("beta")) / 2 + 3
        label = "dry" if words.count("stone") > words.count("water") else "wet"
        metadata = {"scores": {"planted": score, "length": float(len(" ".join(words)))}, "label": label}
        found.append({"text": " ".join(words), "id": str(number), "metadata": metadata})
    return tuple(found)

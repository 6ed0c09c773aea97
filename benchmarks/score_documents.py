"""Documents per second of `qwen-moe data score`: a classifier against tokenizing the same text, and a model that rates many
documents at once against one after another.

    python benchmarks/score_documents.py [--documents 2000] [--rated 24] [--rounds 3] [--json]

The documents are pieces of 3,000 characters of the standard library's source text. The tokenizer (8,192 tokens) is trained
on them; both it and the classifier (262,144 buckets, 32 hidden units, 3 scores) use one process and one thread, and take
turns. The model has the shape of `benchmarks/train_step.py` with random weights, and rates one dimension; the two ways take
turns, too, and the largest difference of their scores is shown. Reported are medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from benchmarks.train_step import SHAPE
from parallel.threads import limit_threads
from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.config import ModelConfig
from qwen_moe.curation.scores.annotate import open_annotator
from qwen_moe.curation.scores.classifier import Classifier, Network, Shape
from qwen_moe.curation.scores.documents import Document
from qwen_moe.curation.scores.settings import ScoreSettings
from qwen_moe.data.corpus import ReadCounts, read_documents
from qwen_moe.data.sources import PYTHON_STDLIB, find_corpus
from qwen_moe.data.tokenizer import load_tokenizer, read_tokenizer, train_tokenizer
from qwen_moe.models.init import build_model

SIZE = 3000  # characters


def pieces(count: int) -> list[str]:
    found: list[str] = []
    counts = ReadCounts()
    for source in find_corpus([PYTHON_STDLIB]).sources:
        for text in read_documents(source, counts):
            found += [text[begin : begin + SIZE] for begin in range(0, len(text) - SIZE + 1, SIZE)]
        if len(found) >= count:
            break
    return found[:count]


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def classifier_against_tokenizer(texts: list[str], tokenizer: Path, rounds: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = Shape(kind="scores", names=("a", "b", "c"), means=(0, 0, 0), deviations=(1, 1, 1))
    classifier, encoder = Classifier(shape, Network(shape)), load_tokenizer(tokenizer)
    sides = (lambda: classifier.of_texts(texts), lambda: encoder.encode_batch(texts, add_special_tokens=False))
    pairs = [tuple(map(seconds, sides)) for _ in range(rounds)]
    torch.set_num_threads(threads)
    return {
        "what": "classifier, against tokenizing",
        "documents_per_second": len(texts) / statistics.median(a for a, _ in pairs),
        "megabytes_per_second": sum(map(len, texts)) / 1e6 / statistics.median(a for a, _ in pairs),
        "speedup": statistics.median(b / a for a, b in pairs),
    }


def at_once_against_one_by_one(texts: list[str], tokenizer: Path, folder: Path, rounds: int) -> dict[str, Any]:
    config = ModelConfig(**SHAPE | {"max_position_embeddings": 4096})
    save_pretrained(build_model(config, 0, torch.float32), folder / "hf", tokenizer=read_tokenizer(tokenizer))
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    settings = ScoreSettings(scorer=str(folder / "hf"), dimensions=("quality",), dtype="fp32")
    rater = open_annotator(settings)
    found = [], []  # type: tuple[list[Any], list[Any]]

    def together() -> None:
        found[0][:] = rater.annotate(documents)

    def one_by_one() -> None:
        found[1][:] = [rater.annotate([document])[0] for document in documents]

    rater.annotate(documents[:2])
    pairs = [(seconds(together), seconds(one_by_one)) for _ in range(rounds)]
    differences = (abs(a["scores"]["quality"] - b["scores"]["quality"]) for a, b in zip(*found, strict=True))
    return {
        "what": "model, at once against one by one, fp32",
        "documents_per_second": len(texts) / statistics.median(a for a, _ in pairs),
        "speedup": statistics.median(b / a for a, b in pairs),
        "largest_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--rated", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    limit_threads()
    texts = pieces(args.documents)
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Path(name) / "tokenizer"
        train_tokenizer(texts, SHAPE["vocab_size"], tokenizer)
        results = [
            classifier_against_tokenizer(texts, tokenizer, args.rounds),
            at_once_against_one_by_one(texts[: args.rated], tokenizer, Path(name), args.rounds),
        ]
    print(json.dumps(results, indent=1) if args.json else "\n".join(map(str, results)))


if __name__ == "__main__":
    main()

"""`qwen-moe data prepare` beside Megatron's preprocessing: the same text, tokenizer and number of workers, by turns.

    python benchmarks/prepare.py --input corpus.jsonl [--megabytes 10] [--workers 2] [--rounds 3]

Megatron's tools/preprocess_data.py is no part of the package megatron-core, so `megatron` below does what its
`process_json_file` does, with the package's own parts: one line of JSON after another through `Pool.imap` in chunks of 32,
`build_tokenizer` with Hugging Face's fast tokenizer in every process, `IndexedDatasetBuilder.add_document` with
--append-eod, and `finalize`. Both are whole commands, from the start of Python to the end. `start` is what each takes for
the first megabyte's 20 lines, and is left out of the second pair of rates.

The .bin must be the same to the byte, and the arrays of the .idx must be equal. Documents that spell out a control token
are left out and counted, because Megatron makes a control id of it, and ours keeps it as text. Seconds are of processors,
all processes together, because other work may share the machine; wall time is reported too.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
CHUNK = 32  # lines that the script hands to a process together
SMALL = 20  # lines of the text that measures the start

_tokenizer: Any = None


def _build(folder: str) -> Any:
    from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer

    nothing = ("vocab_file", "merge_file", "tokenizer_special_tokens", "tokenizer_metadata")
    given = dict.fromkeys(nothing) | {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}
    given |= {"tokenizer_hf_use_fast": True, "trust_remote_code": False, "tokenizer_hf_include_special_tokens": False}
    return build_tokenizer(argparse.Namespace(**given))


def _start(folder: str) -> None:
    global _tokenizer
    _tokenizer = _build(folder)


def _encode(line: str) -> tuple[list[int], list[int]]:
    """Token ids of a document, and the lengths of its sentences, of which there is one."""
    ids = list(_tokenizer.tokenize(json.loads(line)["text"]))
    if ids:
        ids.append(_tokenizer.eod)
    return ids, [len(ids)] if ids else []


def megatron(source: str, prefix: str, folder: str, workers: int) -> None:
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = _build(folder)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    with open(source, encoding="utf-8") as file, multiprocessing.Pool(workers, _start, (folder,)) as pool:
        for ids, lengths in pool.imap(_encode, file, CHUNK):
            builder.add_document(ids, lengths)
        builder.finalize(f"{prefix}.idx")


def cut(source: Path, target: Path, megabytes: float) -> tuple[int, int]:
    """Write the first lines of ``source`` with that much text, each with its text alone. Returns how many were written,
    and how many were left out because they spell out a control token."""
    from qwen_moe.data.tokenizer import CONTROL_TOKENS

    left, count, without = megabytes * 1e6, 0, 0
    with source.open(encoding="utf-8") as file, target.open("w", encoding="utf-8") as out:
        for line in file:
            text = json.loads(line)["text"]
            if any(token in text for token in CONTROL_TOKENS):
                without += 1
                continue
            out.write(json.dumps({"text": text}) + "\n")
            left, count = left - len(text.encode()), count + 1
            if left <= 0:
                break
    return count, without


def measured(command: list[str]) -> dict[str, float]:
    """Run a command. Returns its seconds: wall, and of processors."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu}


def commands(source: Path, folder: Path, tokenizer: Path, workers: int) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "qwen_moe", "data", "prepare", "--input", str(source), "--overwrite"]
    ours += ["--output", str(folder / "ours"), "--tokenizer", str(tokenizer), "--workers", str(workers)]
    theirs = [sys.executable, __file__, "--megatron", str(source), str(folder / "megatron"), str(tokenizer)]
    return {"megatron": [*theirs, "--workers", str(workers)], "ours": ours}


def check_same(folder: Path) -> int:
    """Both outputs hold the same. Returns the number of tokens."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if (folder / "ours.bin").read_bytes() != (folder / "megatron.bin").read_bytes():
        raise RuntimeError("the .bin files differ")
    one, two = (IndexedDataset(str(folder / name)) for name in ("ours", "megatron"))
    assert one.index.dtype == two.index.dtype
    for name in ("sequence_lengths", "sequence_pointers", "document_indices"):
        if not np.array_equal(getattr(one.index, name), getattr(two.index, name)):
            raise RuntimeError(f"{name} of the .idx files differ")
    return int(one.index.sequence_lengths.sum())


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from qwen_moe.data.tokenizer import train_tokenizer

    text, small, tokenizer = folder / "text.jsonl", folder / "small.jsonl", folder / "tokenizer"
    documents, without = cut(args.input, text, args.megabytes)
    with text.open(encoding="utf-8") as file, small.open("w", encoding="utf-8") as out:
        out.writelines(itertools.islice(file, SMALL))
    with text.open(encoding="utf-8") as file:
        train_tokenizer((json.loads(line)["text"] for line in itertools.islice(file, 500)), args.vocabulary, tokenizer)
    settings = (
        tokenizer / "tokenizer_config.json"
    )  # Megatron ends documents with the token that the tokenizer ends texts with
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|endoftext|>"}))
    times: dict[str, list[dict[str, float]]] = {"megatron": [], "ours": []}
    starts: dict[str, list[dict[str, float]]] = {"megatron": [], "ours": []}
    for _ in range(args.rounds):
        for source, into in ((small, starts), (text, times)):
            for name, command in commands(source, folder, tokenizer, args.workers).items():
                into[name].append(measured(command))
    tokens = check_same(folder)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "load": os.getloadavg()[0], "documents": documents,
        "left_out": without, "tokens": tokens, "megabytes": args.megabytes, "workers": args.workers, "rounds": args.rounds,
    }  # fmt: skip
    for unit in ("cpu", "wall"):
        spent = {name: median(one[unit] for one in times[name]) for name in times}
        start = {name: median(one[unit] for one in starts[name]) for name in starts}
        result[unit] = {
            "seconds": spent,
            "start": start,
            "tokens_per_second": {name: tokens / spent[name] for name in spent},
            "ratio": spent["megatron"] / spent["ours"],
            "ratio_without_start": (spent["megatron"] - start["megatron"]) / (spent["ours"] - start["ours"]),
            "ratios": [a[unit] / b[unit] for a, b in zip(times["megatron"], times["ours"], strict=True)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="JSON lines with text")
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--megatron", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.megatron:
        source, prefix, tokenizer = args.megatron
        megatron(source, prefix, tokenizer, args.workers)
        return
    if args.input is None:
        parser.error("--input is missing: give JSON lines with text")
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(args, Path(name)), indent=1))


if __name__ == "__main__":
    main()

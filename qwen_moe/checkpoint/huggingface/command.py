"""The verb `qwen-moe convert`: from-hf, to-hf and upcycle."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.checkpoint.upcycle.command import register as register_upcycle


def register(subparsers: Any) -> None:
    """Add `convert` to the command's subparsers; ``args.func(args)`` returns the exit code."""
    convert = subparsers.add_parser("convert", help="convert weights between Hugging Face and our checkpoints")
    verbs = convert.add_subparsers(dest="direction", required=True, metavar="from-hf|to-hf|upcycle")

    from_hf = verbs.add_parser("from-hf", help="Hugging Face directory -> checkpoint")
    from_hf.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    from_hf.add_argument("checkpoint_dir", type=Path, metavar="CHECKPOINT_DIR", help="new or empty")
    from_hf.add_argument("--json", action="store_true", help="print one JSON document")
    from_hf.set_defaults(func=_from_hf)

    to_hf = verbs.add_parser("to-hf", help="checkpoint -> Hugging Face directory")
    to_hf.add_argument(
        "checkpoint_dir",
        type=Path,
        metavar="CHECKPOINT_DIR",
        help="a checkpoint, or a run directory (newest checkpoint)",
    )
    to_hf.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="new or empty")
    to_hf.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32", "fp8"),
        help="dtype of all weights (default: as stored or computed); fp8: linear layers in 128 x 128 blocks, others bf16",
    )
    to_hf.add_argument(
        "--max-shard-size", metavar="SIZE", help="such as 5GB or 500MiB (default: the original files, or 5GB)"
    )
    to_hf.add_argument(
        "--drop-expert-bias", action="store_true", help="export without a nonzero expert bias instead of refusing"
    )
    to_hf.add_argument("--json", action="store_true", help="print one JSON document")
    to_hf.set_defaults(func=_to_hf)

    register_upcycle(verbs)


def _from_hf(args: argparse.Namespace) -> int:
    from qwen_moe.checkpoint.huggingface.convert import convert_from_hf

    return _report(convert_from_hf(args.hf_dir, args.checkpoint_dir, progress=True), args.json)


def _to_hf(args: argparse.Namespace) -> int:
    from qwen_moe.checkpoint.huggingface.convert import convert_to_hf

    result = convert_to_hf(
        args.checkpoint_dir,
        args.hf_dir,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        drop_expert_bias=args.drop_expert_bias,
        progress=True,
    )
    return _report(result, args.json)


def _report(result: Any, as_json: bool) -> int:
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        dtypes = ", ".join(f"{count} {name}" for name, count in result.dtypes.items())
        print(
            f"{result.target}: {result.family}, {counted(result.tensors, 'tensor')} ({dtypes}), "
            f"{result.bytes / 1e6:.1f} MB"
        )
    return 0

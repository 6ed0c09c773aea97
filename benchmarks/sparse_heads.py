"""Sparse prefill against dense attention, head by head, on the queries and keys of a model that reads a passkey text.

    qwen-moe train recipes/passkey_demo.yaml
    python benchmarks/sparse_heads.py --checkpoint runs/passkey_demo                  # 131,072 tokens
    python benchmarks/sparse_heads.py --checkpoint runs/passkey_demo --length 32768   # a minute

The model reads the text with dual chunk attention. At each chunk of the prompt every head is computed on both sides, sparse
and dense, one after the other; the model goes on with the dense result. Printed for each head: seconds of both sides, the
share of attention that the sparse side kept (of its mean query), the query-key pairs of both sides, and the error.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qwen_moe.data.passkey import noise, prompt
from qwen_moe.generation.engine import Limits
from qwen_moe.generation.likelihood import ScoredText
from qwen_moe.generation.open import HowToRead, Opened, on_one_device
from qwen_moe.models.attention.sparse import SparsePrefill, SparseSettings
from qwen_moe.models.attention.turned import Turned, attend_all


class BothSides(SparsePrefill):
    """Computes every head on both sides and returns the dense result."""

    def __init__(self, settings: SparseSettings) -> None:
        super().__init__(settings)
        self.heads: dict[tuple[int, int], SparsePrefill] = {}
        self.seconds: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.squares: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def attend_head(
        self,
        layer: int,
        head: int,
        turned: Sequence[Turned],
        last: Sequence[Turned],
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        side = self.heads.setdefault((layer, head), SparsePrefill(self.settings))
        sparse, out = _timed(lambda: side.attend_head(layer, head, turned, last, keys, values, scale))
        dense, expected = _timed(lambda: attend_all(turned, keys, values, scale))
        for sums, more in (
            (self.seconds[layer, head], (sparse, dense)),
            (self.squares[layer, head], (float((out - expected).square().sum()), float(expected.square().sum()))),
        ):
            sums[0] += more[0]
            sums[1] += more[1]
        return expected

    def rows(self) -> list[dict[str, float]]:
        found = []
        for (layer, head), side in sorted(self.heads.items()):
            record = side.record.layer(layer)
            (sparse, dense), (error, size) = self.seconds[layer, head], self.squares[layer, head]
            found.append(
                {
                    "layer": layer,
                    "head": head,
                    "sparse_seconds": sparse,
                    "dense_seconds": dense,
                    "times_faster": dense / sparse,
                    "kept": record.mean,
                    "chunks_read_densely": record.dense_heads / (record.dense_heads + record.sparse_heads),
                    "times_fewer_pairs": record.dense_pairs / (record.pairs + record.choosing_pairs),
                    "error": (error / size) ** 0.5,
                }
            )
        return found


def _timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    out = work()
    return time.perf_counter() - begin, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/passkey_demo"))
    parser.add_argument("--length", type=int, default=131072, help="tokens of the text, about")
    parser.add_argument("--chunk-size", type=int, default=512, help="of dual chunk attention")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the prompt that are read at a time")
    parser.add_argument("--kept-share", type=float, default=0.95)
    parser.add_argument("--threshold", type=int, default=32768, help="texts of fewer tokens are read densely")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    opened = Opened(args.checkpoint)
    how = HowToRead(extension="dca", chunk=args.chunk_size, limits=Limits(chunk=args.chunk))
    engine = opened.engine(how, args.length + 1000, on_one_device("fp32", "cpu"))
    sentences = 100 * args.length // len(opened.tokenizer.encode(noise(100)))
    text = prompt(noise(sentences // 2), "71432", noise(sentences - sentences // 2)) + " 71432."
    reader, _ = engine.reader(args.length)
    both = BothSides(SparseSettings(kept_share=args.kept_share, threshold=args.threshold))
    reader.sparse = both  # type: ignore[attr-defined]
    ids = opened.tokenizer.encode(text)
    # All tokens are scored: if only the next token were wanted, the last layer would compute no other query.
    (found,) = engine.likelihoods([ScoredText(ids, len(ids) - 1)])
    rows = both.rows()
    if args.json:
        print(json.dumps({"tokens": len(ids), "loss": -found.log_prob / (len(ids) - 1), "heads": rows}))
        return
    print(f"{len(ids):,} tokens; loss {-found.log_prob / (len(ids) - 1):.3f} nats per token")
    for row in rows:
        print(
            f"layer {row['layer']} head {row['head']}: sparse {row['sparse_seconds']:.1f} s, "
            f"dense {row['dense_seconds']:.1f} s, {row['times_faster']:.1f} times; "
            f"kept {row['kept']:.3f}; {row['times_fewer_pairs']:.1f} times fewer pairs; "
            f"{row['chunks_read_densely']:.0%} of the chunks read densely; error {row['error']:.3f}"
        )


if __name__ == "__main__":
    main()

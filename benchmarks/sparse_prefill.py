"""Sparse prefill against dense attention: one head, one prompt in chunks, both sides taking turns at every chunk.

    python benchmarks/sparse_prefill.py                                                # 131,072 tokens, planted lines
    python benchmarks/sparse_prefill.py --length 1048576 --dim 128 --without-dense     # counts pairs only
    python benchmarks/sparse_prefill.py --tensors head.pt    # q, k, v [T, C] of a model's head, rotated

Prints the time of the dense side divided by that of the sparse side, the share of attention that was kept (measured on
queries that did not choose), and the query-key pairs of both, those of choosing and measuring included.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qwen_moe.models.attention.sparse import SparsePrefill, SparseSettings
from qwen_moe.models.attention.turned import Turned, Zone, attend_all


def planted(length: int, dim: int, columns: int, diagonals: int, seed: int) -> dict[str, torch.Tensor]:
    """A head that attends to the first tokens, to ``columns`` keys anywhere and at ``diagonals`` far distances. Scores are
    q k / sqrt(dim). Each key on a diagonal is known by a random direction, so all other keys get a little attention too:
    with the defaults 3%, more for longer texts (give a larger ``dim``) and for more diagonals."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.nn.functional.normalize(torch.randn(length, dim, generator=generator), dim=-1)
    sink, line = torch.eye(dim)[:2]
    q = 13 * sink + 13 * line + torch.zeros(length, 1)
    for offset in torch.randint(length // 64, length // 2, (diagonals,), generator=generator).tolist():
        q[offset:] += 15 * code[: length - offset]
    k = code.clone()
    k[:4] += sink
    k[torch.randint(0, length, (columns,), generator=generator)] += line
    return {"q": q * math.sqrt(dim), "k": k, "v": torch.randn(length, dim, generator=generator)}


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    out = work()
    return time.perf_counter() - begin, out


def read(tensors: dict[str, torch.Tensor], chunk: int, sparse: SparsePrefill, dense: bool) -> dict[str, float]:
    """Read the prompt once on both sides, or on the sparse one only."""
    q, k, v = (tensors[name][None, :, None] for name in ("q", "k", "v"))
    length, scale, count = q.shape[1], 1 / math.sqrt(q.shape[-1]), sparse.settings.choosing
    seconds, error, size = {"sparse": 0.0, "dense": 0.0}, 0.0, 0.0
    for begin in range(0, length, chunk):
        end = min(length, begin + chunk)
        turned = [Turned(begin, end, (Zone(q[:, begin:end], 0, end),))]

        def densely(turned: list[Turned] = turned) -> torch.Tensor:
            return attend_all(turned, k, v, scale)

        def sparsely(turned: list[Turned] = turned, begin: int = begin, end: int = end) -> torch.Tensor:
            if not sparse.takes(0, 1, begin, end - begin):
                return attend_all(turned, k, v, scale)
            last = [Turned(end - count, end, (Zone(q[:, end - count : end], 0, end),))]
            return sparse.attend(0, turned, last, k, v, scale)

        taken, out = timed(sparsely)
        seconds["sparse"] += taken
        if dense:
            taken, expected = timed(densely)
            seconds["dense"] += taken
            error += float((out - expected).square().sum())
            size += float(expected.square().sum())
    return seconds | ({"error": math.sqrt(error / size)} if dense else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=32768, help="tokens of the prompt that are read at a time")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--columns", type=int, default=300, help="planted columns")
    parser.add_argument("--diagonals", type=int, default=2, help="planted far diagonals")
    parser.add_argument("--tensors", type=Path, help="a file of torch.save with q, k, v [T, C], rotated")
    parser.add_argument("--kept-share", type=float, default=0.95)
    parser.add_argument("--rows", type=int, default=SparseSettings.rows, help="queries in a block")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-dense", action="store_true", help="count pairs, do not run the dense side")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tensors is not None:
        tensors = torch.load(args.tensors, weights_only=True)
    else:
        tensors = planted(args.length, args.dim, args.columns, args.diagonals, seed=0)
    rounds = []
    for _ in range(args.rounds):
        sparse = SparsePrefill(SparseSettings(kept_share=args.kept_share, rows=args.rows))
        with torch.no_grad():
            found = read(tensors, args.chunk, sparse, not args.without_dense)
        layer = sparse.record.layer(0)
        found |= {
            "share": layer.mean,
            "worst": layer.worst,
            "work": sparse.record.work,
            "dense_pairs": layer.dense_pairs,
        }
        found["ratio"] = found["dense"] / found["sparse"]
        rounds.append(found)
        if not args.json:
            against = f"dense {found['dense']:.1f} s, {found['ratio']:.1f} times; error {found.get('error', 0):.3f}; "
            print(
                f"{len(tensors['q']):,} tokens: sparse {found['sparse']:.1f} s; {'' if args.without_dense else against}"
                f"kept {found['share']:.4f} (worst query {found['worst']:.3f}); "
                f"pairs {layer.pairs + layer.choosing_pairs:,} of {layer.dense_pairs:,}: {1 / found['work']:.1f} times fewer"
            )
    if args.json:
        print(json.dumps(rounds))


if __name__ == "__main__":
    main()

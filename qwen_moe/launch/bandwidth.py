"""`python -m qwen_moe.launch.bandwidth ATTEMPT LOCAL`: one rank of the preflight's bandwidth test.

The test measures an all-reduce, an all-to-all and transfers between pairs of nodes.
"""

import os
import sys
import time
from pathlib import Path

from launchers.folder.run_folder import Attempt

PAIR_ROUNDS = 3


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """A few rounds of disjoint pairs of nodes, with new partners in each round (the circle method of tournaments)."""
    places = list(range(nodes)) + ([-1] if nodes % 2 else [])
    found = []
    for _ in range(min(PAIR_ROUNDS, len(places) - 1)):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]))
        found.append([(a, b) for a, b in pairs if -1 not in (a, b)])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def main(folder: str) -> int:
    import torch
    import torch.distributed as dist

    from parallel.process import process_info, start
    from parallel.threads import Threads

    attempt = Attempt(Path(folder))
    plan = attempt.read("plan.json")
    info = process_info()
    device = start(
        info, Threads(count=1, why="preflight"), timeout_minutes=float(plan["preflight"]["timeout_seconds"]) / 60
    )
    local, nodes = info.local_world_size, info.world_size // info.local_world_size
    node = info.rank // local
    elements = max(info.world_size, int(float(plan["preflight"]["message_mb"]) * 1e6 / 4))
    elements -= elements % info.world_size
    data = torch.ones(elements, device=device)
    received = torch.empty_like(data)

    def timed(work: "object", repeats: int = 2) -> float:
        """Seconds of the fastest of ``repeats`` calls on the slowest rank, after one warm-up call."""
        best = float("inf")
        for index in range(repeats + 1):
            dist.barrier()
            begin = time.perf_counter()
            work()  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if index:
                best = min(best, float(took))
        return best

    gigabytes = elements * 4 * local / 1e9  # sum over the ranks of a node
    world = info.world_size
    share = 2 * (world - 1) / world  # bytes that a ring all-reduce sends, per byte of data
    all_reduce = gigabytes * share / timed(lambda: dist.all_reduce(data))
    all_to_all = gigabytes * (world - 1) / world / timed(lambda: dist.all_to_all_single(received, data))
    pair = float("inf") if nodes == 1 else 0.0
    for matches in rounds(nodes):
        partner = next((b if a == node else a for a, b in matches if node in (a, b)), None)
        dist.barrier()
        if partner is not None:
            pair = max(pair, gigabytes / _exchange(data, received, partner * local + info.local_rank, info.rank))
    if info.local_rank == 0:
        host = os.environ.get("QWEN_MOE_NODE", "localhost")
        attempt.write(f"bandwidth/{host}.json", {"all_reduce": all_reduce, "all_to_all": all_to_all, "pair": pair})
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _exchange(data: "object", received: "object", peer: int, rank: int) -> float:
    """Seconds to exchange a message with another rank, in both directions at once; the better of two tries."""
    import torch
    import torch.distributed as dist

    best = float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        operations = [dist.P2POp(dist.isend, data, peer), dist.P2POp(dist.irecv, received, peer)]  # type: ignore[arg-type]
        for request in dist.batch_isend_irecv(operations if rank < peer else operations[::-1]):
            request.wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)

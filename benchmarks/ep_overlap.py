"""What `parallel.ep_overlap` gains: steps with and without it, on two local processes whose messages take time.

    python benchmarks/ep_overlap.py [--rounds 15] [--milliseconds 12] [--image timeline.png] [--json]

Between processes of one machine, messages take next to no time. So each process gets a link here that carries one message
at a time: an all-to-all arrives only when the link has had time for it, ``--milliseconds`` for the rows of a whole
micro-batch, half of that for a half, and ``--latency-ms`` for any message, such as the counts of rows. While a process
waits, it sleeps. All variants live in the same two processes and take turns, so that a drifting machine slows them alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launchers.folder.atomic import replaced
from parallel import expert
from parallel.collectives import Pending
from parallel.local_group import preload, run_local
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.verify.ranks import make_trainer, micro_batches

WAIT, LAUNCH, MESSAGE = "wait", "launch", "message"
VARIANTS = {  # name: (parallel.ep_overlap, whether messages take time)
    "plain": (False, True),
    "ep_overlap": (True, True),
    "plain, messages at once": (False, False),
    "ep_overlap, messages at once": (True, False),
}
COLORS = {"A": "#4c78a8", "B": "#e4894a", "both": "#9a9a9a", "wait": "#e8d5d5"}


def config_for(overlap: bool, recompute: str) -> RunConfig:
    """4 sequences of 256 tokens a step on each process; 18 M parameters, 10 M of them activated."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": {
                "family": "qwen3_moe",
                "vocab_size": 4096,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 256,
            },
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 128},
            "training": {
                "train_tokens": 10**6,
                "micro_batch_size": 4,
                "global_batch_size": 8,
                "recompute": recompute,
            },
            "optimizer": {"learning_rate": 1e-4},
            "precision": {"compute": "fp32", "master": "fp32"},
            "parallel": {"ep": 2, "ep_overlap": overlap},
        },
        "benchmark",
    )


@dataclass
class Link:
    """A process's link. ``seconds_per_row``: of a row to another process; 0 for ``latency`` and rows: messages at once.
    ``events`` are (kind, half, begin, end) of one step."""

    latency: float = 0.0
    seconds_per_row: float = 0.0
    free: float = 0.0
    events: list[tuple[str, str, float, float]] = field(default_factory=list)

    def carry(self, rows: int) -> float:
        """When a message that begins now arrives."""
        self.free = max(time.perf_counter(), self.free) + self.latency + rows * self.seconds_per_row
        return self.free

    def sleep(self, arrival: float) -> None:
        time.sleep(max(0.0, arrival - time.perf_counter()))


class Delayed(Pending):
    """A message that is there when the link has carried it."""

    def __init__(self, pending: Pending, link: Link, half: str, arrival: float) -> None:
        super().__init__(pending._work, pending.buffer, pending._keep)
        self.link, self.half, self.arrival = link, half, arrival

    def wait(self) -> torch.Tensor:
        begin = time.perf_counter()
        found = super().wait()
        self.link.sleep(self.arrival)
        self.link.events.append((WAIT, self.half, begin, time.perf_counter()))
        return found


@contextmanager
def delayed(link: Link, halves: int) -> Iterator[None]:
    """Every message between experts takes ``link``."""
    plan_of, launch, plans = expert.Exchange.plan, expert._launch, list[Any]()

    def plan(self: Any, *args: Any) -> Any:
        begin = time.perf_counter()
        found = plan_of(self, *args)
        link.sleep(link.carry(0))
        link.events.append((WAIT, "", begin, time.perf_counter()))
        plans.append(found)
        return found

    def launched(rows: torch.Tensor, of: Any, axis: Any, back: bool) -> Pending:
        number = next(place for place, one in enumerate(plans) if one is of)
        half = "AB"[number % halves]
        sizes = of.receive if back else of.send
        begin = time.perf_counter()
        before = link.free
        arrival = link.carry(sum(sizes) - sizes[axis.index])
        link.events += [(LAUNCH, half, begin, begin), (MESSAGE, half, max(begin, before), arrival)]
        return Delayed(launch(rows, of, axis, back), link, half, arrival)

    messages: Any = expert
    messages.Exchange.plan, messages._launch = plan, launched
    try:
        yield
    finally:
        messages.Exchange.plan, messages._launch = plan_of, launch


def measure(rounds: int, milliseconds: float, latency: float, recompute: str) -> dict[str, Any]:
    """Seconds of every variant's steps, and the events of the median one. Runs in both ranks."""
    trainers = {overlap: make_trainer(config_for(overlap, recompute)) for overlap in (False, True)}
    batches = micro_batches(trainers[False], 0)
    # Of four sequences of 128 tokens, each with two choices, half go to the other process on average.
    per_row = milliseconds / 1000 / (4 * 128 * 2 / 2)
    found: dict[str, Any] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, (overlap, slow) in VARIANTS.items():
            link = Link(latency / 1000, per_row) if slow else Link()
            with delayed(link, 2 if overlap else 1):
                dist.barrier()
                begin = time.perf_counter()
                trainers[overlap].engine.forward_backward([trainers[overlap].to_device(batch) for batch in batches])
                end = time.perf_counter()
                dist.barrier()
            trainers[overlap].optimizer.zero_grad()
            if turn:  # the first is a warm-up
                events = [(kind, half, a - begin, b - begin) for kind, half, a, b in link.events]
                found[name].append((time.perf_counter() - begin, end - begin, events))
    return found


def work(events: list[tuple[str, str, float, float]], end: float) -> list[tuple[str, float, float]]:
    """(half, begin, end) of what is computed: each half's work ends with a launch of its own."""
    steps = sorted((event for event in events if event[0] != MESSAGE), key=lambda event: event[2])
    launches = [event for event in steps if event[0] == LAUNCH]
    middle = len(launches) // 2  # without recomputation, as many messages in forward as in backward
    found, at = [], 0.0
    for kind, _, begin, finish in [*steps, (WAIT, "", end, end)]:
        coming = next((one for one in launches if one[2] >= begin), None)
        earlier = sum(one[2] < begin for one in launches)
        waited = next((one[1] for one in reversed(steps) if one[0] == WAIT and one[1] and one[3] <= at + 1e-9), "A")
        owner = coming[1] if coming is not None else waited
        if earlier == middle and begin - at > 0.002 and kind == LAUNCH:
            owner = "both"  # the head and the loss
        if begin > at:
            found.append((owner, at, begin))
        at = max(at, finish)
    return found


def draw(steps: dict[str, tuple[float, list[Any]]], path: Path) -> None:
    """Timelines of one step of each variant."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    longest = max(end for end, _ in steps.values()) * 1000
    figure, axes = plt.subplots(len(steps), 1, figsize=(13, 2.5 * len(steps)), layout="constrained", squeeze=False)
    for axis, (name, (end, events)) in zip(axes.flat, steps.items(), strict=True):
        halves = sorted({half for kind, half, *_ in events if kind == MESSAGE})
        rows = ["computes", *(f"messages of {half}" if len(halves) > 1 else "messages" for half in halves)]
        bars: list[tuple[int, str, float, float]] = [(0, "wait", 0.0, end)]
        bars += [(0, half, begin, finish) for half, begin, finish in work(events, end)]
        bars += [(1 + halves.index(half), half, a, b) for kind, half, a, b in events if kind == MESSAGE]
        for row, color, begin, finish in bars:
            axis.barh(row, 1000 * (finish - begin), left=1000 * begin, color=COLORS[color], height=0.7, linewidth=0)
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.set_xlim(0, longest)
        axis.set_title(f"{name}: {1000 * end:.0f} ms", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    shown = {"A": "half A (or the whole micro-batch)", "B": "half B", "both": "head and loss", "wait": "waits"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[key]) for key in shown]
    axes.flat[0].legend(handles, shown.values(), ncols=4, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    axes.flat[-1].set_xlabel("milliseconds of one step on one of two processes")
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=12.0, help="of the rows of a whole micro-batch")
    parser.add_argument("--latency-ms", type=float, default=0.5)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--image", type=Path, help="draw a step of both (without recomputation)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    preload(["qwen_moe.verify.ranks"])
    ranks = run_local(measure, 2, args.rounds, args.milliseconds, args.latency_ms, args.recompute, timeout=3600)
    found = {name: ranks[0][name] for name in VARIANTS}
    seconds: Callable[[str], list[float]] = lambda name: [one[0] for one in found[name]]  # noqa: E731
    rows: list[dict[str, Any]] = []
    for name in VARIANTS:
        ratios = [a / b for a, b in zip(seconds(name), seconds("plain"), strict=True)]
        rows.append({"variant": name, "seconds": statistics.median(seconds(name)), "ratio": statistics.median(ratios)})
        rows[-1] |= {"lowest": min(ratios), "highest": max(ratios)}
    if args.image:
        median = {name: sorted(found[name], key=lambda one: one[1])[len(found[name]) // 2] for name in VARIANTS}
        draw({name: median[name][1:] for name in ("plain", "ep_overlap")}, args.image)
    if args.json:
        print(json.dumps({"milliseconds": args.milliseconds, "recompute": args.recompute, "rows": rows}))
        return
    print(f"{'variant':30s} {'step':>9s} {'of plain':>9s} {'range':>12s}")
    for row in rows:
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        print(f"{row['variant']:30s} {1000 * row['seconds']:6.0f} ms {row['ratio']:9.2f} {spread:>12s}")


if __name__ == "__main__":
    main()

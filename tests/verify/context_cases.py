"""Layouts with context parallelism, and batches that are hard on it: documents of every shape, labels that a rank lacks."""

from collections.abc import Callable
from typing import Any

import torch

from parallel.mesh import Layout
from parallel.sequence import Batch
from qwen_moe.config import RunConfig
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.verify import ranks, reference
from qwen_moe.verify.case import global_batch
from qwen_moe.verify.compare import Differences, compare
from qwen_moe.verify.ranks import Report, train_rank
from tests.distributed import run_distributed
from tests.verify.cases import QWEN3, STEPS, case

SEQUENCE = 24  # twice the product of cp and tp divides it in most cases


def context_case(layout: Layout, kind: str, steps: int = STEPS, **changes: Any) -> RunConfig:
    """`case` with ``parallel.cp_kind``; ``ring+2`` and ``all_gather+2`` exchange heads among 2 neighbours."""
    name, _, heads = kind.partition("+")
    sequence = changes.pop("data__sequence_length", SEQUENCE)
    rows = changes.get("training__global_batch_size", 2 * layout.dp * max(2, 2 * layout.pp))
    own = {
        "data__sequence_length": sequence,
        "training__train_tokens": steps * rows * sequence,
        "parallel__cp_kind": name,
        "parallel__cp_ulysses": int(heads or 1),
    }
    return case(layout, **own | changes)


def _lengths(config: RunConfig) -> list[list[int]]:
    """Lengths of the documents of each row, in turn."""
    whole, cp = config.data.sequence_length, config.parallel.cp
    chunk = whole // (2 * cp)
    return [
        [1] * whole,
        [whole],
        [chunk] * (2 * cp),
        [1, whole - 2, 1],
        [whole // 2, whole - whole // 2],
        [chunk - 1, chunk + 1, 1, whole - 2 * chunk - 1],
    ]


def _with_documents(config: RunConfig, batch: Batch) -> Batch:
    shapes = _lengths(config)
    ends = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    for row, row_ends in enumerate(ends):
        row_ends[torch.tensor(shapes[row % len(shapes)]).cumsum(0) - 1] = True
    return batch | documents_of(ends)


def _with_labels(config: RunConfig, batch: Batch) -> Batch:
    """Every other row has no label in the chunks of the last cp rank, and the row after each has none at all."""
    labels = batch["labels"].clone()
    chunk = labels.shape[1] // (2 * config.parallel.cp)
    middle = chunk * (config.parallel.cp - 1)
    labels[::2, middle : middle + 2 * chunk] = IGNORE
    labels[1::4] = IGNORE
    return batch | {"labels": labels}


BATCHES: dict[str, Callable[[RunConfig, Batch], Batch]] = {
    "": lambda config, batch: batch,
    "documents": _with_documents,
    "labels": _with_labels,
    "both": lambda config, batch: _with_labels(config, _with_documents(config, batch)),
}


def use_batches(kind: str, module: Any) -> None:
    """Let ``module`` train on the batches ``kind``."""
    module.global_batch = lambda config, step: BATCHES[kind](config, global_batch(config, step))


def train_on(config: RunConfig, batches: str, steps: int, probe: bool) -> Report:
    use_batches(batches, ranks)
    return train_rank(config, steps, probe)


def reference_on(config: RunConfig, layout: Layout, batches: str, steps: int, probe: bool = False) -> Any:
    use_batches(batches, reference)
    try:
        return reference.train_reference(config, layout.dp, steps, probe)
    finally:
        use_batches("", reference)


def differences(config: RunConfig, layout: Layout, batches: str = "", probe: bool = False) -> Differences:
    reports = run_distributed(train_on, layout.world_size, config, batches, STEPS, probe)
    return compare(reports, reference_on(config, layout, batches, STEPS, probe))


DOCUMENTS = {"data__respect_document_boundaries": True}
RECOMPUTED = {"training__recompute": "full"}
SELECTED = {"training__recompute": "selective"}
DENSE = {
    "model__family": "qwen3",
    "model__num_experts": 0,
    "model__num_experts_per_tok": 0,
    "model__moe_intermediate_size": 0,
    "model__shared_expert_intermediate_size": 0,
    "model__mlp_only_layers": [],
    "balance__bias_update_rate": 0.0,
}

# (layout, kind, batches, probe, changes). What is in each is in its name. `QUICK` are broad; `MORE` are one thing at a time.
Case = tuple[Layout, str, str, bool, dict[str, Any]]

QUICK: dict[str, Case] = {
    "ring, tp with fewer KV heads than ranks, documents, drops, recomputed": (
        Layout(cp=2, tp=4, ep=4, etp=2), "ring", "documents", False,
        DOCUMENTS | RECOMPUTED | {"balance__capacity_factor": 0.75, "data__sequence_length": 32},
    ),
    "all_gather, interleaved stages, tied embeddings, ep over cp": (
        Layout(cp=2, pp=2, dp=2, ep=4), "all_gather", "labels", False, {"parallel__schedule": "interleaved_1f1b"},
    ),
    "ulysses, more ranks than KV heads, documents, zero3, balance of sequences": (
        Layout(cp=4, dp=2, ep=2), "ulysses", "both", False,
        DOCUMENTS | {"parallel__sharding": "zero3", "balance__scope": "sequence"},
    ),
    "ulysses inside ring, zbv, documents, recomputed but for attention": (
        Layout(cp=4, pp=2, ep=4), "ring+2", "documents", False, DOCUMENTS | SELECTED | {"parallel__schedule": "zbv"},
    ),
    "ulysses inside all_gather, tp, drops, QK-norm, the probe": (
        Layout(cp=4, tp=2, ep=8), "all_gather+2", "", True,
        QWEN3 | {"balance__capacity_factor": 0.5, "data__sequence_length": 16, "model__num_attention_heads": 4},
    ),
    "ring over three, dualpipev": (
        Layout(cp=3, pp=2), "ring", "both", False, DOCUMENTS | {"parallel__schedule": "dualpipev"},
    ),
    "all_gather over eight, one row at a time, micro-batch balance, the probe": (
        Layout(cp=8, ep=8), "all_gather", "labels", True,
        {
            "data__sequence_length": 16,
            "training__micro_batch_size": 1,
            "training__global_batch_size": 3,
            "balance__scope": "micro_batch",
        },
    ),
    "ring, tp, transformers' balance, an odd number of micro-batches": (
        Layout(cp=2, tp=2, dp=2, ep=4), "ring", "labels", False,
        {"balance__scope": "huggingface", "training__global_batch_size": 12},
    ),
}  # fmt: skip


def _each_kind() -> dict[str, Case]:
    """Every kind with every batch, schedule and scope, one at a time."""
    cases: dict[str, Case] = {}
    for kind in ("ring", "all_gather", "ulysses", "ring+2", "all_gather+2"):
        cp = 4 if "+" in kind else 2
        for batches in ("documents", "labels", "both"):
            changes = DOCUMENTS if batches != "labels" else {}
            cases[f"{kind}, {batches}"] = (Layout(cp=cp, ep=cp), kind, batches, False, changes)
            cases[f"{kind}, {batches}, the probe"] = (Layout(cp=cp), kind, batches, True, changes)
        for schedule in ("1f1b", "interleaved_1f1b", "zbv", "dualpipev"):
            changes = {"parallel__schedule": schedule} | RECOMPUTED
            cases[f"{kind}, {schedule}"] = (Layout(cp=cp, pp=2, ep=2), kind, "", False, changes)
        for scope in ("none", "micro_batch", "sequence", "global_batch", "huggingface"):
            changes = {"balance__scope": scope}
            cases[f"{kind}, {scope} balance"] = (Layout(cp=cp, dp=2, ep=2), kind, "labels", False, changes)
        for factor in (0.25, 0.75, 1.25):
            changes = {"balance__capacity_factor": factor, "data__sequence_length": 32} | DOCUMENTS
            cases[f"{kind}, capacity {factor}"] = (Layout(cp=cp, tp=2, ep=2), kind, "both", False, changes)
        cases[f"{kind}, zero3, recomputed"] = (
            Layout(cp=cp, dp=2, etp=2),
            kind,
            "documents",
            False,
            DOCUMENTS | RECOMPUTED | {"parallel__sharding": "zero3"},
        )
        cases[f"{kind}, dense"] = (
            Layout(cp=cp, tp=2),
            kind,
            "both",
            False,
            DOCUMENTS | DENSE | {"data__sequence_length": 32},
        )
    return cases  # fmt: skip


MORE = _each_kind()

"""Compares `step_time` with published runs. One set of constants serves all of them; it was fitted to some of the runs."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from parallel.mesh import layout_for
from parallel.stages import split_layers
from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.models.flops import layer_costs
from qwen_moe.planning.hardware import Cluster, Gpu, load_gpu, load_network
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.software import MEGATRON, OURS, Software
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.planning.times import StepTime
from qwen_moe.sharding.layout import ContextPlan, RunLayout

SEQUENCE = 4096
GPU = "h100-80gb"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published run: TFLOP/s per GPU, as published and as predicted."""

    name: str
    published: float
    predicted: float
    fitted: bool
    round: int  # of adding rows: the later one was chosen before its errors were known
    gpu: str
    precision: str
    assumed: str
    source: str
    step: StepTime

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def _model(name: str, shapes: dict[str, Any]) -> ModelConfig:
    return parse_model(shapes.get(name, {"preset": name}), name)


@cache
def _layers(model: ModelConfig, sequence: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Of each stage. Rows share splits, which take seconds for many layers."""
    costs = layer_costs(model, sequence)
    return tuple(map(tuple, split_layers(costs.layers, stages, first=costs.embedding, last=costs.head)))


def _layout(run: dict[str, Any], model: ModelConfig, choice: Choice, sequence: int) -> RunLayout:
    degrees = {name: getattr(choice, name) for name in ("pp", "cp", "tp", "ep", "etp")}
    grid = layout_for(run["gpus"], **degrees)
    return RunLayout(
        layout=grid,
        context=ContextPlan(kind=run.get("cp_kind", "ring")),
        layers=_layers(model, sequence, choice.pp * choice.per_rank),
        per_rank=choice.per_rank,
        micro_batches=run["global_batch"] // (grid.dp * choice.micro_batch),
    )


def _gpu(named: str | dict[str, Any], h100: Gpu) -> Gpu:
    """By name; or an H100 with some changes; ``h100`` is what an H100 is taken to be."""
    if isinstance(named, dict):
        return h100.model_copy(update=named)
    return h100 if named == GPU else load_gpu(named)


def _software(run: dict[str, Any], megatron: Software) -> Software:
    if run.get("software") == "torch":
        return OURS
    return replace(
        megatron,
        tp_overlap=run.get("tp_overlap", 0.0),
        ep_overlap=run.get("ep_overlap", 0.0),
        once_per_node=run.get("once_per_node", True),
        host_us=0.0 if run.get("host_ahead") else megatron.host_us,
    )


def rows(h100: Gpu | None = None, megatron: Software = MEGATRON) -> Iterator[Row]:
    """Each published run with our prediction."""
    data = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    for run in data["runs"]:
        model, choice = _model(run["model"], data["models"]), Choice(**run["layout"])
        named, sequence = run.get("gpu", GPU), run.get("sequence", SEQUENCE)
        gpu = _gpu(named, h100 or load_gpu(GPU))
        cluster = Cluster(gpu, load_network(run.get("network", "ib400")), run.get("gpus_per_node", 8))
        factor = data["score_factors"].get(run["model"], 1.0)
        times = StepTimeModel(
            model,
            sequence,
            cluster,
            _software(run, megatron),
            score_factor=factor,
            recomputed=run.get("recomputed", 0.0),
        )
        step = times.step(choice, _layout(run, model, choice, sequence))
        flops = times.flops() * run["global_batch"] * sequence / run["gpus"]
        if "tflops" in run:
            published = run["tflops"]
        elif "tokens" in run:
            published = run["tokens"] * times.flops() / 1e12
        else:
            published = run["mfu"] * gpu.peak_tflops["bf16"]
        yield Row(
            name=run["name"],
            published=published,
            predicted=flops / step.total / 1e12,
            fitted=run.get("fit", False),
            round=run.get("round", 1),
            gpu=named if isinstance(named, str) else "h800",
            precision=choice.precision,
            assumed=run.get("assumed", ""),
            source=run["source"],
            step=step,
        )


def median_error(found: list[Row]) -> float:
    """Median of the absolute relative errors."""
    return statistics.median(abs(row.error) for row in found)


def table(found: list[Row]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| run | GPU | published | predicted | error | constants |", "|---|---|---|---|---|---|"]
    for row in found:
        kind = ("fitted" if row.fitted else "held out") + ("; new" if row.round > 1 else "")
        kind += f"; assumed: {row.assumed}" if row.assumed else ""
        gpu = row.gpu.split("-")[0].upper()
        lines.append(f"| {row.name} | {gpu} | {row.published:.0f} | {row.predicted:.0f} | {row.error:+.0%} | {kind} |")
    held = [row for row in found if not row.fitted]
    parts = {
        "all": found,
        "those held out": held,
        "of these, the new ones": [row for row in held if row.round > 1],
        "held out on an H100 or H800": [row for row in held if row.gpu in (GPU, "h800")],
        "held out on other GPUs": [row for row in held if row.gpu not in (GPU, "h800")],
        "held out in FP8": [row for row in held if row.precision == "fp8"],
    }
    medians = "; ".join(f"{median_error(part):.1%} over {name} ({len(part)})" for name, part in parts.items())
    lines += ["", f"TFLOP/s per GPU. Median absolute error: {medians}."]
    return "\n".join(lines)

"""Compares `step_time` with published runs. One set of constants serves all of them; it was fitted to some of the runs."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from parallel.mesh import layout_for
from parallel.stages import split_layers
from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.models.flops import layer_costs
from qwen_moe.planning.hardware import Cluster, Gpu, load_gpu, load_network
from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.software import MEGATRON, Software
from qwen_moe.planning.step_time import StepTime, StepTimeModel
from qwen_moe.sharding.layout import RunLayout

SEQUENCE = 4096
# Megatron's two streams hide about this share of the all-to-alls behind other micro-batches.
EP_OVERLAP = 0.3


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published run: TFLOP/s per GPU, as published and as predicted."""

    name: str
    published: float
    predicted: float
    fitted: bool
    further: bool  # not among the seven runs that the model was asked to predict
    assumed: str
    source: str
    step: StepTime

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def _model(name: str, shapes: dict[str, Any]) -> ModelConfig:
    return parse_model(shapes.get(name, {"preset": name}), name)


def _layout(run: dict[str, Any], model: ModelConfig, choice: Choice) -> RunLayout:
    degrees = {name: getattr(choice, name) for name in ("pp", "cp", "tp", "ep", "etp")}
    grid = layout_for(run["gpus"], **degrees)
    costs = layer_costs(model, SEQUENCE)
    stages = choice.pp * choice.per_rank
    layers = split_layers(costs.layers, stages, first=costs.embedding, last=costs.head)
    return RunLayout(
        layout=grid,
        layers=tuple(map(tuple, layers)),
        per_rank=choice.per_rank,
        micro_batches=run["global_batch"] // (grid.dp * choice.micro_batch),
    )


def rows(gpu: Gpu | None = None, software: Software = MEGATRON, ep_overlap: float = EP_OVERLAP) -> Iterator[Row]:
    """Each published run with our prediction."""
    data = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    gpu = gpu or load_gpu("h100-80gb")
    cluster = Cluster(gpu, load_network("ib400"), gpus_per_node=8)
    for run in data["runs"]:
        model, choice = _model(run["model"], data["models"]), Choice(**run["layout"])
        used = replace(
            software,
            ep_overlap=ep_overlap if run.get("ep_overlap") else 0.0,
            once_per_node=run.get("once_per_node", True),
        )
        factor = data["score_factors"].get(run["model"], 1.0)
        recomputed = run.get("recomputed", 0.0)
        times = StepTimeModel(model, SEQUENCE, cluster, used, score_factor=factor, recomputed=recomputed)
        step = times.step(choice, _layout(run, model, choice))
        flops = times.flops() * run["global_batch"] * SEQUENCE / run["gpus"]
        yield Row(
            name=run["name"],
            published=run.get("tflops") or run["mfu"] * gpu.peak_tflops["bf16"],
            predicted=flops / step.total / 1e12,
            fitted=run.get("fit", False),
            further=run.get("further", False),
            assumed=run.get("assumed", ""),
            source=run["source"],
            step=step,
        )


def median_error(found: list[Row]) -> float:
    """Median of the absolute relative errors."""
    return statistics.median(abs(row.error) for row in found)


def table(found: list[Row]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| run (H100) | published | predicted | error | constants |", "|---|---|---|---|---|"]
    for row in found:
        kind = ("fitted" if row.fitted else "held out") + ("; further" if row.further else "")
        kind += f"; assumed: {row.assumed}" if row.assumed else ""
        lines.append(f"| {row.name} | {row.published:.0f} | {row.predicted:.0f} | {row.error:+.0%} | {kind} |")
    asked = [row for row in found if not row.further]
    parts = [("all", found), ("those held out", [r for r in found if not r.fitted]), ("the seven asked for", asked)]
    parts.append(("those of the seven held out", [r for r in asked if not r.fitted]))
    medians = "; ".join(f"{median_error(part):.1%} over {name} ({len(part)})" for name, part in parts)
    lines += ["", f"TFLOP/s per GPU. Median absolute error: {medians}."]
    return "\n".join(lines)

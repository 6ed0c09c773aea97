"""Counts of a traced step against counts by hand, and what a trace must find."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen_moe.cli import main
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.errors import UserError
from qwen_moe.models.moe.dispatch import Arrived
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.moe.router import Router
from qwen_moe.tracing.cost import bytes_of, traffic
from qwen_moe.tracing.page import facts, groups, waits_in_experts, wide_kernels
from qwen_moe.tracing.rank import StepTrace, trace_step

aten = torch.ops.aten

# Tokens of a micro-batch, hidden, experts, top-k, expert hidden, vocabulary.
T, D, E, K, F, V = 64, 32, 4, 2, 16, 96
HEADS, KV, C = 4, 2, 16


def recipe(**changes: Any) -> dict[str, Any]:
    model = {
        "family": "qwen3_moe", "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": C, "num_experts": E,
        "num_experts_per_tok": K, "moe_intermediate_size": F, "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "run_dir": "unused",
        "model": model,
        "data": {"train": [{"prefix": "unused"}], "sequence_length": T},
        "training": {"train_tokens": 10**6, "micro_batch_size": 1, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1e-4},
    } | changes


def config(**changes: Any) -> RunConfig:
    return parse_config(recipe(**changes), "test")


def work(trace: StepTrace, part: str, phase: str, *ops: str) -> tuple[int, int]:
    """(launches, FLOPs) of these operations in layer 0."""
    found = [
        w
        for (place, op), w in trace.counter.work.items()
        if (place.layer, place.part, place.phase) == (0, part, phase) and op in ops
    ]
    return sum(w.launches for w in found), sum(w.flops for w in found)


def collectives(trace: StepTrace, axis: str, kind: str) -> list[tuple[int, int, str, int]]:
    """(layer, bytes, phase, FLOPs beside it) of collectives in layers, without FSDP2's."""
    return [
        (c.place.layer, c.bytes, c.place.phase, c.behind_flops)
        for c in trace.counter.collectives
        if (c.axis, c.kind) == (axis, kind) and c.place.layer >= 0 and not c.own_stream
    ]


@pytest.fixture(scope="module")
def alone() -> StepTrace:
    return trace_step(config(), 1)


def test_matmuls_of_a_layer_are_those_counted_by_hand(alone: StepTrace) -> None:
    micro_batches = 4
    matmuls = ("mm", "addmm", "addmm_", "mm_")
    projections = 2 * T * D * C * (HEADS + 2 * KV + HEADS)
    assert work(alone, "attention", "forward", *matmuls) == (4 * micro_batches, projections * micro_batches)
    assert work(alone, "attention", "backward", *matmuls) == (8 * micro_batches, 2 * projections * micro_batches)
    up_and_down = 2 * T * K * D * 2 * F + 2 * T * K * F * D
    assert work(alone, "experts", "forward", "_grouped_mm") == (2 * micro_batches, up_and_down * micro_batches)
    assert work(alone, "experts", "backward", "_grouped_mm") == (4 * micro_batches, 2 * up_and_down * micro_batches)
    router = 2 * T * D * E
    assert work(alone, "experts", "forward", *matmuls) == (micro_batches, router * micro_batches)
    scores = "_scaled_dot_product_flash_attention_for_cpu"
    pairs = T * (T + 1) // 2
    assert work(alone, "attention", "forward", scores) == (micro_batches, 4 * HEADS * C * pairs * micro_batches)
    back = work(alone, "attention", "backward", f"{scores}_backward")
    assert back == (micro_batches, 10 * HEADS * C * pairs * micro_batches)


def test_experts_of_one_device_make_the_host_wait_for_nothing(alone: StepTrace) -> None:
    assert waits_in_experts(alone) == 0
    assert wide_kernels(alone) == 0
    assert alone.counter.collectives == []


def test_layers_alike_stand_together(alone: StepTrace) -> None:
    assert [group.layers for group in groups(alone)] == [[0, 1], []]


def test_the_optimizer_reads_weights_gradients_and_moments(alone: StepTrace) -> None:
    parameters = 2 * V * D + D  # embedding, head, final norm
    parameters += 2 * (2 * D + 2 * C + D * C * (2 * HEADS + 2 * KV) + E * D + E * 3 * D * F)
    adam = [w for (place, op), w in alone.counter.work.items() if place.part == "optimizer" and op == "_fused_adamw_"]
    tensors = 12 * 2 + 3  # AdamW counts steps in a float32 for each
    assert sum(w.read for w in adam) == pytest.approx(4 * 4 * parameters, abs=8 * tensors)
    assert sum(w.written for w in adam) == pytest.approx(3 * 4 * parameters, abs=8 * tensors)


def test_two_ranks_of_tp_gather_and_reduce_each_sequence() -> None:
    trace = trace_step(config(parallel={"tp": 2}), 2)
    hidden = T * D * 2  # bytes: the whole sequence in bfloat16
    for kind in ("all_gather", "reduce_scatter"):
        found = [call for call in collectives(trace, "tp", kind) if call[0] == 0]
        forward = [size for _, size, phase, _ in found if phase == "forward"]
        assert forward == [hidden] * 4, kind  # once around attention in each of 4 micro-batches
    backward = [call for call in collectives(trace, "tp", "all_gather") if call[0] == 0 and call[2] == "backward"]
    assert [size for _, size, _, _ in backward] == [hidden] * 8  # of the gradient, and of the input again
    assert sum(flops > 0 for *_, flops in backward) == 4  # the input's travels while the gradient is multiplied


def test_two_ranks_of_ep_exchange_rows_and_wait_once() -> None:
    trace = trace_step(config(parallel={"ep": 2}), 2)
    micro_batches, rows, weights = 2, T * K * D * 2, T * K * 2
    assert waits_in_experts(trace) == 1
    assert wide_kernels(trace) == 0
    found = [call for call in collectives(trace, "ep", "all_to_all") if call[0] == 0]
    forward = sorted(size for _, size, phase, _ in found if phase == "forward")
    assert forward == sorted(([E * 8] + [rows, weights, rows]) * micro_batches)  # counts in int64; out, and back
    assert [size for _, size, phase, _ in found if phase == "backward"] == [rows, rows, weights] * micro_batches


def by_operation(trace: StepTrace, layer: int, part: str, phase: str) -> dict[str, tuple[int, int]]:
    """(launches, FLOPs) of each operation of a part."""
    return {
        op: (w.launches, w.flops)
        for (place, op), w in trace.counter.work.items()
        if (place.layer, place.part, place.phase) == (layer, part, phase)
    }


def test_halves_that_take_turns_are_booked_under_experts() -> None:
    """A micro-batch in two halves launches in its experts what two micro-batches of half the size do."""
    training = recipe()["training"] | {"micro_batch_size": 2}
    halves = trace_step(config(training=training, parallel={"ep": 2, "ep_overlap": True}), 2)
    whole = trace_step(config(parallel={"ep": 2}), 2)
    for layer in (0, 1):
        forward = by_operation(halves, layer, "experts", "forward")
        assert forward == by_operation(whole, layer, "experts", "forward") and len(forward) > 10
    for trace in (halves, whole):
        backward = by_operation(trace, 0, "experts", "backward")
        # Of two halves, two GEMMs for each of up (twice as wide) and down.
        assert backward["_grouped_mm"] == (2 * 4, 2 * (2 * 2 + 2) * 2 * T * K * D * F)
        found = [call[1:3] for call in collectives(trace, "ep", "all_to_all") if call[0] == 0]
        # Of each half: counts, rows and weights out, rows back, and the gradients of the last three.
        assert len(found) == 2 * 7
    assert waits_in_experts(halves) == 2  # once for each half


def test_the_shared_expert_runs_beside_the_exchange() -> None:
    model = recipe()["model"] | {"family": "qwen2_moe", "shared_expert_intermediate_size": 24}
    trace = trace_step(config(model=model, parallel={"ep": 2}), 2)
    found = [call for call in collectives(trace, "ep", "all_to_all") if call[0] == 0 and call[2] == "forward"]
    shared = 2 * T * D * 24 * 3 + 2 * T * D  # gate, up, down, and its gate of one column
    assert [flops for *_, flops in found if flops] == [shared] * 2 * 2  # beside rows and weights of two micro-batches


@pytest.mark.parametrize("rank", [0, 1])
def test_two_stages_send_hidden_states_and_gradients(rank: int) -> None:
    trace = trace_step(config(parallel={"pp": 2}), 2, rank)
    messages = [(c.kind, c.axis, c.bytes) for c in trace.counter.collectives if c.place.part == "between stages"]
    expected = [(kind, "pp", T * D * 2) for kind in ("receive", "send") for _ in range(4)]
    assert sorted(messages) == expected
    assert trace.layers == [rank]


@pytest.mark.parametrize("parallel", [{"tp": 2, "ep": 2, "etp": 2}, {"etp": 4}, {"tp": 4, "etp": 4}], ids=str)
def test_etp_copies_without_a_wait_and_its_rows_are_no_index_over_all_experts(parallel: dict[str, int]) -> None:
    model = recipe()["model"] | {"moe_intermediate_size": 32, "num_hidden_layers": 1}
    trace = trace_step(config(parallel=parallel, model=model), 4)
    assert waits_in_experts(trace) == 1
    assert wide_kernels(trace) == 0  # with etp 4, T * K * 4 rows arrive: more than the T * E elements of a mask


@pytest.mark.parametrize("fp8", ["blockwise", "mxfp8"])
def test_scales_of_fp8_are_no_index_over_all_experts(fp8: str) -> None:
    sizes = {"hidden_size": 256, "head_dim": 32, "moe_intermediate_size": 256, "num_hidden_layers": 1}
    precision = {"compute": "fp8", "fp8": {"recipe": fp8}}
    assert wide_kernels(trace_step(config(model=recipe()["model"] | sizes, precision=precision), 1)) == 0


def test_experts_that_no_gpu_groups_are_refused() -> None:
    with pytest.raises(UserError, match="etp 4 cuts experts of model"):
        trace_step(config(parallel={"etp": 4}), 4)
    model = recipe()["model"] | {"moe_intermediate_size": 12}
    with pytest.raises(UserError, match="moe_intermediate_size 12 is not a multiple of 8"):
        trace_step(config(model=model), 1)
    in_float32 = trace_step(config(model=model, precision={"compute": "fp32"}), 1)
    assert any("one GEMM of all rows" in line for line in facts(in_float32)["assumed"])


def test_capacity_costs_one_read_more_and_sums_over_all_experts() -> None:
    trace = trace_step(config(parallel={"tp": 2, "ep": 2}, balance={"capacity_factor": 1.5}), 2)
    assert waits_in_experts(trace) == 2
    assert wide_kernels(trace) > 0


def test_capacity_of_whole_sequences() -> None:
    trace = trace_step(config(balance={"capacity_factor": 1.5}), 1)
    assert waits_in_experts(trace) == 1


def test_a_planted_read_in_the_expert_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Experts.compute

    def reads(self: Experts, arrived: Arrived) -> torch.Tensor:
        assert arrived.rows.counts.max().item() >= 0
        return compute(self, arrived)

    monkeypatch.setattr(Experts, "compute", reads)
    trace = trace_step(config(), 1)
    assert waits_in_experts(trace) == 1
    (event,) = {event for event in trace.counter.events if event.place.part == "experts" and event.place.layer == 0}
    assert (event.kind, event.place.phase) == ("value read by the host", "forward")
    assert event.where.startswith("tests/tracing/test_trace.py")


def test_a_planted_mask_of_all_experts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    select = Router._select

    def masks(self: Router, probs: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        indices = select(self, probs, experts)
        torch.zeros_like(probs, dtype=torch.bool).scatter_(1, indices, True).nonzero()
        return indices

    monkeypatch.setattr(Router, "_select", masks)
    assert wide_kernels(trace_step(config(parallel={"tp": 2}), 2)) >= 2 * 2 * 4
    trace = trace_step(config(), 1)
    assert wide_kernels(trace) >= 2 * 2 * 4  # filled and set, in 2 layers and 4 micro-batches
    assert waits_in_experts(trace) == 1  # for the number of places
    assert {e.op for e in trace.counter.events if e.place.layer == 0} >= {"nonzero", "scatter_"}


def test_bytes_of_an_operation() -> None:
    x, picked = torch.zeros(100, 8), torch.zeros(5, dtype=torch.int64)
    assert bytes_of(x[:1].expand(50, 8)) == 32
    out = x.index_select(0, picked)
    assert traffic(aten.index_select.default, (x, 0, picked), {}, out) == (160 + 40, 160)
    assert traffic(aten.add_.Tensor, (x, x), {}, x) == (6400, 3200)
    assert traffic(aten.zero_.default, (x,), {}, x) == (0, 3200)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UserError, match=r"--rank 2 is none of the 2 ranks: give 0 to 1"):
        trace_step(config(parallel={"tp": 2}), 2, 2)
    with pytest.raises(UserError, match=r"objective.kind sft reads document_starts"):
        trace_step(config(objective={"kind": "sft"}), 1)


def test_the_command_prints_the_same_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: StepTrace
) -> None:
    path, page = tmp_path / "r.yaml", tmp_path / "page.md"
    path.write_text(yaml.safe_dump(recipe()))
    assert main(["trace", str(path), "--json", "--page", str(page)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts(alone)))
    launches = f"{facts(alone)['total']['launches']:,} launches"
    assert launches in page.read_text() and "| experts | _grouped_mm |" in page.read_text()
    assert main(["trace", str(path)]) == 0
    assert launches in capsys.readouterr().out

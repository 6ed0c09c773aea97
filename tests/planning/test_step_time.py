"""The model of time: published runs, closed forms, and the direction in which things must go."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

import qwen_moe.planning
from qwen_moe.config import parse_config, parse_model
from qwen_moe.models.flops import flops_per_token
from qwen_moe.planning.hardware import Cluster, Gpu, Network, load_gpu, load_network
from qwen_moe.planning.layouts import Choice, legal
from qwen_moe.planning.published import Row, median_error, rows
from qwen_moe.planning.rates import fewest_on_a_node
from qwen_moe.planning.search import Search
from qwen_moe.planning.software import MEGATRON, OURS
from qwen_moe.planning.step_time import StepTimeModel
from qwen_moe.planning.times import StepTime
from qwen_moe.sharding.layout import RunLayout
from tests.planning.recipes import turbo_style, values

H100, IB400 = load_gpu("h100-80gb"), load_network("ib400")


@cache
def published() -> list[Row]:
    return list(rows())


def step(choice: Choice, gpus: int = 64, gpu: Gpu = H100, network: Network = IB400, imbalance: float = 1.0) -> StepTime:
    config = turbo_style()
    layout = legal(config, choice, gpus)
    assert isinstance(layout, RunLayout), layout
    return StepTimeModel(config.model, 4096, Cluster(gpu, network, 8), OURS, imbalance).step(choice, layout)


def test_published_runs_are_predicted() -> None:
    found = published()
    held = [row for row in found if not row.fitted]
    assert all(abs(row.error) < 0.1 for row in found if row.fitted)
    assert sum(row.fitted for row in found) < len(found) / 4
    assert median_error(held) < 0.10
    assert median_error([row for row in held if row.round > 1]) < 0.10
    assert median_error([row for row in held if row.precision == "fp8"]) < 0.10
    assert all(row.source and abs(row.error) < 0.40 for row in found)


@pytest.mark.parametrize(("gpu", "least"), [("h800", 1), ("a100-80gb", 4), ("b200-180gb", 5), ("gb200-186gb", 6)])
def test_the_hardware_files_predict_published_runs(gpu: str, least: int) -> None:
    """No constant was fitted to a run on these GPUs."""
    found = [row for row in published() if row.gpu == gpu]
    assert len(found) >= least and not any(row.fitted for row in found)
    assert median_error(found) < 0.15


def test_a_host_that_prepares_every_experts_kernels_bounds_the_time() -> None:
    """128 experts on 8 ranks: 16 a rank, six GEMMs each, are launched beside the layer's other kernels."""
    model = parse_model({"preset": "qwen3-235b-a22b"}, "test")
    slow = replace(MEGATRON, host_us=1000.0)
    for ep, local in ((8, 16), (64, 2)):
        choice = Choice(ep=ep)
        part = StepTimeModel(model, 4096, Cluster(H100, IB400, 8), slow).layer(choice, True)
        assert part.total == pytest.approx((160 + 6 * local) * 1e-3)


def test_published_runs_count_flops_as_we_do() -> None:
    """Tokens and FLOPs per second and GPU that Megatron-Bridge's page gives for one run are our FLOPs per token."""
    for preset, tokens, tflops in (("qwen3-235b-a22b", 1575, 233), ("qwen3-30b-a3b", 10494, 241)):
        model = parse_model({"preset": preset}, preset)
        assert flops_per_token(model, 4096).training == pytest.approx(tflops * 1e12 / tokens, rel=0.01)


def test_the_shapes_beside_the_published_runs_are_those_of_the_models() -> None:
    """Published parameter counts, in billions: total and activated."""

    from qwen_moe.models.flops import count_parameters

    data = yaml.safe_load((Path(qwen_moe.planning.__file__).parent / "published.yaml").read_text())
    moe = (("mixtral-8x22b", 141, 39), ("mixtral-8x7b", 46.7, 12.9), ("deepseek-v3", 671, 37))
    llama = ((f"llama{name}b", size, size) for name, size in (("3-8", 8.03), ("3-70", 70.6), ("3-405", 405.9)))
    llama2 = (("llama2-13b", 13.0, 13.0), ("llama2-70b", 69.0, 69.0))
    for name, total, active in (*moe, *llama, *llama2):
        counts = count_parameters(parse_model(data["models"][name], name))
        assert counts.total / 1e9 == pytest.approx(total, rel=0.01), name
        assert counts.activated / 1e9 == pytest.approx(active, rel=0.02), name


def test_the_bubble_is_the_textbooks() -> None:
    """(pp - 1) / m of the busy time for 1F1B, divided by the stages per rank when interleaved (arXiv 2104.04473)."""
    for schedule, per_rank in (("1f1b", 1), ("interleaved_1f1b", 2)):
        choice = Choice(pp=4, schedule=schedule, per_rank=per_rank)
        found = step(choice)
        busy = found.compute + found.tp + found.ep
        assert found.bubble / busy == pytest.approx(3 / 64 / per_rank)


def test_nothing_is_faster_than_the_peak() -> None:
    """Of the products' and the scores' FLOPs, which are all that is counted."""
    for gpu in (H100, load_gpu("a100-80gb"), load_gpu("b200-180gb")):
        for choice in (Choice(), Choice(tp=4, ep=8), Choice(micro_batch=8)):
            work = flops_per_token(turbo_style().model, 4096).training * 1024 * 4096 / 64
            assert step(choice, gpu=gpu).compute > work / (gpu.peak_tflops["bf16"] * 1e12)


def test_nothing_travels_faster_than_the_links() -> None:
    """Forward and backward both send: every choice of a token goes to its expert and back twice, a hidden state to the next
    stage and its gradient back."""
    model = turbo_style().model.model_copy(update={"shared_expert_intermediate_size": 0})  # which hides some of it
    hidden, tokens = 2 * model.hidden_size, 1024 * 4096 / 64
    ideal = H100.efficiency.model_copy(update={"nvlink": 1.0, "network": 1.0, "all_to_all": 1.0})
    gpu = H100.model_copy(update={"efficiency": ideal})
    times = StepTimeModel(model, 4096, Cluster(gpu, IB400, 8), replace(OURS, pp_overlap=0.0))
    spread, pipeline = Choice(ep=8), Choice(pp=2)
    layouts = [legal(turbo_style(), choice, 64) for choice in (spread, pipeline)]
    assert all(isinstance(layout, RunLayout) for layout in layouts)
    sent = 4 * len(model.moe_layers) * tokens * model.num_experts_per_tok * hidden * 7 / 8
    assert times.step(spread, layouts[0]).ep > sent / (H100.nvlink_gb_per_second * 1e9)
    assert times.step(pipeline, layouts[1]).pp > 2 * 2 * tokens * hidden / (IB400.gb_per_second * 1e9)


def test_halves_hide_the_way_to_experts_and_cost_smaller_products() -> None:
    plain = Choice(ep=8, micro_batch=4)
    for recompute, exposed in (("none", 0.2), ("full", 0.4)):
        off = step(replace(plain, recompute=recompute))
        on = step(replace(plain, recompute=recompute, ep_overlap=True))
        assert on.ep == pytest.approx(exposed * off.ep, rel=0.05) and on.compute > off.compute
    # Between nodes messages take longer than computation, which hides no more than its own time.
    plain = Choice(ep=32, micro_batch=4)
    off, on = step(plain), step(replace(plain, ep_overlap=True))
    assert off.ep > off.compute and on.total < off.total
    assert on.ep > off.ep - on.compute
    for nothing in (replace(plain, micro_batch=1), replace(plain, ep=1)):
        assert step(replace(nothing, ep_overlap=True)) == step(nothing)


def test_what_costs_more_takes_longer() -> None:
    base = Choice(ep=8)
    plain = step(base)
    assert step(replace(base, recompute="full")).compute == pytest.approx(plain.compute * 4 / 3, rel=0.05)
    assert step(base, imbalance=1.5).imbalance > plain.imbalance == 0
    slow = load_network("ib200")
    wide = Choice(ep=32)
    assert step(wide, network=slow).ep > 1.5 * step(wide).ep > 1.5 * plain.ep
    assert step(base, network=slow).ep == plain.ep  # within a node
    assert step(Choice(tp=8)).tp > step(Choice(tp=2)).tp > plain.tp == 0
    assert step(Choice(sharding="zero3"), network=load_network("ethernet100")).dp > step(Choice(sharding="zero3")).dp


def test_experts_that_are_not_cut_along_their_own_dim_cost_copies() -> None:
    """8 experts a rank on 32 ranks are not padded, but read and written once more at each gather and before a reduction."""
    config, choice = turbo_style(), Choice(ep=8)
    layout = legal(config, choice, 256)
    assert isinstance(layout, RunLayout) and layout.layout.edp == 32
    m = config.model
    times = StepTimeModel(m, 4096, Cluster(H100, IB400, 8), OURS)
    copying = times.step(choice, layout).dp
    for key, of in times._collectives.items():
        times._collectives[key] = replace(of, gather_copies=0.0, reduce_copies=0.0)
    plain = times.step(choice, layout).dp
    experts = len(m.moe_layers) * (m.num_experts // 8) * 3 * m.hidden_size * m.moe_intermediate_size
    moved = experts * (2 * 2 * layout.micro_batches + 2 * 4)
    assert copying - plain == pytest.approx(moved / (H100.memory_gb_per_second * 1e9 * H100.efficiency.memory))


def test_a_reduction_for_every_micro_batch_costs_time() -> None:
    choice = Choice(ep=8, sharding="zero3")
    last, every = step(choice, 256), step(replace(choice, gradient_reduction="every"), 256)  # 4 micro-batches
    assert last.dp < every.dp < 4 * last.dp
    assert replace(every, dp=last.dp) == last


def test_a_double_peak_halves_the_time_of_products_only() -> None:
    twice = H100.model_copy(update={"peak_tflops": {"bf16": 2 * 989.4}})
    assert 0.5 * step(Choice()).compute < step(Choice(), gpu=twice).compute < step(Choice()).compute


@pytest.mark.parametrize(
    ("gpus", "choice", "part"),
    [
        (24, Choice(tp=2, ep=4), ""),
        (24, Choice(pp=3), "pp"),  # a stage is a node
        (24, Choice(pp=12), "pp"),  # four stages are in a node; the last of them sends to the next node
        (24, Choice(pp=4), "dp pp"),  # ranks 6 to 11 are on two nodes
        (24, Choice(ep=6), "ep"),
        (24, Choice(ep=3), "ep"),  # ranks 6, 7 and 8 are on two nodes
        (24, Choice(tp=3), "tp"),
        (24, Choice(cp=3, cp_kind="ring"), "cp"),
        (24, Choice(cp=3, cp_kind="ulysses"), "cp"),
        (6, Choice(ep=3), ""),  # one node, which is not full
        (6, Choice(pp=6), ""),
    ],
)
def test_only_groups_that_lie_within_a_node_do_without_the_network(gpus: int, choice: Choice, part: str) -> None:
    """With a tenth of the network, what is sent over it takes several times as long, and nothing else does. (Not so the
    reduction over all ranks, which is left out unless it is meant.)"""
    shape = {"num_experts": 48, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 128}
    sizes = {"vocab_size": 152064, "intermediate_size": 12288, "shared_expert_intermediate_size": 5376}
    recipe = values({"preset": "turbo_style"} | shape | sizes, 12288, global_batch_size=960)
    config = parse_config(recipe, "test")
    layout = legal(config, choice, gpus)
    assert isinstance(layout, RunLayout), layout
    slow = IB400.model_copy(update={"gb_per_second": 5.0})
    fast, slower = (Search(config, gpus, Cluster(H100, links, 8)).time.step(choice, layout) for links in (IB400, slow))
    parts = ("tp", "cp", "ep", "pp") + (("dp",) if "dp" in part else ())
    assert [name for name in sorted(parts) if getattr(slower, name) > 3 * getattr(fast, name)] == part.split()


def test_ranks_of_a_group_on_a_node_are_those_counted_one_by_one() -> None:
    for node in (1, 4, 6, 7, 8, 72):
        for ranks in (1, 2, 3, 6, 8, 12, 24):
            for stride in (1, 2, 3, 5, 8, 9):
                found: dict[tuple[int, int, int], int] = {}
                for rank in range(math.lcm(ranks * stride, node)):
                    place = (rank // (ranks * stride), rank % stride, rank // node)
                    found[place] = found.get(place, 0) + 1
                assert fewest_on_a_node(ranks, stride, node) == min(found.values())


def test_a_forward_that_is_repeated_is_launched_again() -> None:
    """So where the host is the limit, recomputation takes a third more time, too."""
    slow = replace(OURS, host_us=1000.0)
    times = StepTimeModel(turbo_style().model, 4096, Cluster(H100, IB400, 8), slow)
    for moe, kernels in ((True, 240), (False, 110)):
        assert times.layer(Choice(), moe).total == pytest.approx(kernels * 1e-3)
        assert times.layer(Choice(recompute="full"), moe).total == pytest.approx(kernels * 4 / 3 * 1e-3)

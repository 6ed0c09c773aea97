"""The text that `qwen-moe plan` prints."""

from launchers.counted import counted
from qwen_moe.config import RunConfig
from qwen_moe.planning.memory import Memory
from qwen_moe.planning.sampling import SamplingTime, Workload
from qwen_moe.planning.search import Misfit, Plan, Scored, changes
from qwen_moe.planning.software import OURS

GIB, MIB = 2**30, 2**20


def _memory(memory: Memory) -> str:
    parts = ["weights", "gradients", "optimizer", "activations", "working", "buffers"]
    if memory.reference:
        parts.append("reference")
    return "  ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in parts)


def _time(scored: Scored) -> str:
    step = scored.step
    parts = (
        "compute",
        "tp",
        *(["cp"] if scored.choice.cp > 1 else []),
        "ep",
        "pp",
        "dp",
        "bubble",
        "imbalance",
        "optimizer",
        *(name for name in ("sampling", "preparing") if getattr(step, name)),
    )
    return "  ".join(f"{name} {getattr(step, name) / step.total:.1%}" for name in parts)


def _one(number: int, scored: Scored, plan: Plan) -> list[str]:
    grid, usable = scored.layout.layout, plan.cluster.gpu.usable_bytes / GIB
    cost = f"   {scored.cost:,.0f} {plan.cluster.gpu.currency}" if scored.cost else ""
    stages = [len(layers) for layers in scored.layout.layers]
    layers = f"{min(stages)}-{max(stages)}" if min(stages) != max(stages) else f"{stages[0]}"
    pipeline = (
        f", {counted(scored.layout.per_rank, 'stage')} per rank of {layers} {'layer' if layers == '1' else 'layers'}"
        if scored.choice.pp > 1
        else ""
    )
    lines = [
        f"{number}. {scored.choice}",
        f"   dp={grid.dp} edp={grid.edp}, {counted(scored.layout.micro_batches, 'micro-batch')}{pipeline}",
        f"   step {scored.step.total:.3f} s   {scored.tokens_per_second:,.0f} tokens/s/GPU   {scored.tflops:.0f} TFLOP/s/GPU"
        f"   MFU {scored.mfu:.1%}" + (f"   {scored.gpu_hours:,.0f} GPU-hours{cost}" if scored.gpu_hours else ""),
        f"   time     {_time(scored)}",
        f"   memory   {scored.memory.total / GIB:.1f} of {usable:.1f} GiB: {_memory(scored.memory)}",
    ]
    if scored.choice.cp > 1:
        lines += _context(scored)
    if scored.sampling is not None:
        lines += _sampling(scored, scored.sampling, plan.config)
    if number == 1 and plan.overlapped is not None:
        lines.append(_overlapped(plan.overlapped, scored, usable))
    if number == 1 and plan.kinds:
        lines += _kinds(plan.kinds, usable)
    return lines


def _context(scored: Scored) -> list[str]:
    """What context parallelism costs."""
    choice, sent = scored.choice, scored.traffic
    again = " (with recomputation)" if sent.repeated else ""
    return [
        f"   cp       {scored.layout.context.text(choice.cp)}: per layer and micro-batch a rank sends "
        f"{sent.forward / MIB:,.0f} MiB in forward and {sent.backward / MIB:,.0f} in backward{again}"
    ]


def _overlapped(scored: Scored, plain: Scored, usable: float) -> str:
    """What ``parallel.ep_overlap`` would change."""
    size = scored.memory.total / GIB
    fits = "" if size <= usable else ", too large"
    return (
        f"   overlap  {scored.step.total / plain.step.total:.3f} times the step, {size:.1f} GiB{fits}: "
        f"parallel.ep_overlap=true, if {OURS.halves_overlap:.0%} of its messages hide (assumed, not measured)"
    )


def _sampling(scored: Scored, time: SamplingTime, config: RunConfig) -> list[str]:
    """What sampling an episode takes, and what a rank then holds."""
    work, memory = Workload.of(config, scored.layout.layout.dp), scored.memory
    parts = ("prompts", "weights", "cache", "kernels", "exchange")
    shares = "  ".join(f"{name} {getattr(time, name) / time.total:.1%}" for name in parts)
    held = memory.sampling - memory.cache
    return [
        f"   sampling {time.total:,.1f} s an episode if all answers are {counted(work.new_tokens, 'token')} long: {shares}",
        f"            a rank holds {memory.sampling / GIB:.1f} GiB then: cache {memory.cache / GIB:.1f} of "
        f"{counted(work.answers, 'answer')} with prompts of up to {work.prompt_tokens:,} tokens  all else {held / GIB:.1f}",
    ]


def _kinds(kinds: list[Scored], usable: float) -> list[str]:
    """The kinds of context parallelism with one layout: times of a step and memory, fastest first."""
    found = []
    for one in kinds:
        size = one.memory.total / GIB
        fits = "" if size <= usable else ", too large"
        name = one.layout.context.text(one.choice.cp)
        found.append(
            f"            {one.step.total / kinds[0].step.total:.3f} times the step, {size:.1f} GiB{fits}: {name}"
        )
    return ["   kinds    " + found[0].lstrip(), *found[1:]]


def _misfit(misfit: Misfit, plan: Plan) -> list[str]:
    scored, usable = misfit.scored, plan.cluster.gpu.usable_bytes / GIB
    faster = f", {plan.best[0].step.total / scored.step.total - 1:.1%} faster" if plan.best else ""
    lines = [
        f"   {scored.choice}: {scored.memory.total / GIB:.1f} of {usable:.1f} GiB{faster}",
        f"     {_memory(scored.memory)}",
    ]
    if misfit.nearest is not None:
        near = misfit.nearest
        lines.append(
            f"     fits with {', '.join(changes(scored.choice, near.choice))}: {near.memory.total / GIB:.1f} GiB, "
            f"{near.step.total / scored.step.total:.2f} times its step"
        )
    return lines


def _length(config: RunConfig) -> str:
    """How long the run is, and what of it is not planned."""
    training = config.training
    if not training.train_tokens:
        plural = "s" if training.epochs > 1 else ""
        return f"{training.epochs} epoch{plural}, whose tokens are known when the data are read"
    billions = training.train_tokens / 1e9
    amount = f"{billions:,.1f} billion" if billions >= 0.1 else f"{training.train_tokens:,}"
    text = f"{amount} tokens in all"
    if config.objective.reads == "samples":
        text += " at most; rewards are not in these figures"
        if config.rollout is not None and config.rollout.server is not None:
            text += ", nor is the server that samples"
    return text


def plan_text(plan: Plan, name: str) -> str:
    """The best layouts, and those that would be faster but do not fit."""
    config, cluster = plan.config, plan.cluster
    lines = [
        f"{name} on {plan.gpus} x {cluster.gpu.name}, {cluster.gpus_per_node} per node, {cluster.network.name}",
        f"global batch {config.training.global_batch_size:,} x {config.data.sequence_length:,} tokens, {_length(config)}",
        f"{counted(plan.legal, 'legal layout')}, {plan.seconds:.1f} s; times are estimates (docs/plan.md), "
        "memory is counted",
        "",
    ]
    for number, scored in enumerate(plan.best, start=1):
        lines += [*_one(number, scored, plan), ""]
    if not plan.best:
        more = (
            f"something fits on {counted(plan.gpus_needed, 'GPU')}"
            if plan.gpus_needed
            else "nor on 32 times as many GPUs"
        )
        lines += [f"nothing fits; {more}. The leanest layouts:"]
    elif plan.misfits:
        lines += ["faster, but too large:"]
    for misfit in plan.misfits:
        lines += _misfit(misfit, plan)
    return "\n".join(lines).rstrip()

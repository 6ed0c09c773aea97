"""How a training program uses the hardware: what it overlaps and fuses. One is ours, one is Megatron's (published runs)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Software:
    """Overlap and fusion. ``*_overlap`` is the share of communication that computation hides, if it takes as long."""

    name: str
    tp_overlap: float
    ep_overlap: float  # all-to-alls behind other micro-batches
    halves_overlap: float  # all-to-alls behind the other half of the micro-batch, with `Choice.overlaps`
    shared_expert_overlap: bool  # the shared expert hides dispatch in forward and combine in backward
    once_per_node: bool  # a token travels once to each node that has experts for it (DeepEP), not once per expert
    cp_overlap: float  # messages of a ring behind attention
    pp_overlap: float
    dp_overlap: float  # without a pipeline, or if the pipeline reduces during its last backward
    pipeline_reduces_at_end: bool  # gradients are reduced after a stage's last backward, when nothing can hide it
    elementwise: float  # bytes moved by unfused operations, relative to the counts in step_time.py
    dense_kernels: int  # launched by one layer in forward and backward, without the experts' GEMMs
    moe_kernels: int
    expert_kernels: int  # for each local expert, in forward and backward: 0 if one kernel computes all experts' GEMMs
    host_us: float  # in which the host prepares and launches a kernel, if more than `Gpu.kernel_launch_us`
    fp8_matrix_us: float  # to launch and run the kernels that find a matrix's largest value and cast it
    pads_shards: bool  # to a multiple of the data-parallel ranks, and copies what is not cut along dim 0 (FSDP2)
    gathers_each_micro_batch: bool  # weights are, without a pipeline (FSDP2 reshards after each backward)


OURS = Software(
    name="qwen-moe",
    tp_overlap=0.0,
    ep_overlap=0.0,
    halves_overlap=0.8,
    shared_expert_overlap=True,
    once_per_node=False,
    cp_overlap=0.8,
    pp_overlap=0.3,
    dp_overlap=0.7,
    pipeline_reduces_at_end=True,
    elementwise=1.0,
    dense_kernels=110,
    moe_kernels=240,
    expert_kernels=0,
    host_us=0.0,
    fp8_matrix_us=21.0,
    pads_shards=True,
    gathers_each_micro_batch=True,
)

MEGATRON = Software(
    name="Megatron-Core",
    tp_overlap=0.0,
    ep_overlap=0.0,
    halves_overlap=0.8,
    shared_expert_overlap=False,
    once_per_node=True,
    cp_overlap=0.8,
    pp_overlap=0.7,
    dp_overlap=0.8,
    pipeline_reduces_at_end=False,
    elementwise=0.8,
    dense_kernels=80,
    moe_kernels=160,
    expert_kernels=6,  # two GEMMs in forward and four in backward
    host_us=36.0,
    fp8_matrix_us=21.0,
    pads_shards=False,
    gathers_each_micro_batch=False,
)

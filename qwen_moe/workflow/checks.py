"""What a pipeline refuses before its first step, because it would otherwise fail after the small runs were paid for."""

import argparse
from collections.abc import Sequence

from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.workflow.state import State


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError or LaunchError for options that contradict each other, or name a GPU, a network or a site file that
    does not exist."""
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(f"--gpus {args.gpus}: give a multiple of --gpus-per-node {args.gpus_per_node} (whole nodes)")
    if args.submit and not args.gpus:
        raise UserError("--submit needs --gpus: give the number of GPUs to request")
    if args.slurm and args.threads:
        raise UserError("--threads is for small runs on this machine: with --slurm, set launch.threads in the recipe")
    if args.gpus:
        from qwen_moe.planning.hardware import load_gpu, load_network

        load_gpu(args.gpu)
        if args.network:
            load_network(args.network)
    if args.gpus or args.slurm:
        from launchers.slurm.site import load_site

        load_site(args.site)


def check_steps(args: argparse.Namespace, config: RunConfig, state: State, steps: Sequence[str]) -> None:
    """Raises UserError if ``steps``, all that this call goes through, lack what only the user can give, or plan a precision
    that the GPU does not have or a model that cannot be planned. Raises LaunchError if they need a Slurm that does not
    answer. A budget that the ladder was made with need not be given again."""
    if args.gpus and "plan" in steps:
        from qwen_moe.planning.hardware import load_gpu
        from qwen_moe.sharding.aligned import check_aligned

        load_gpu(args.gpu).require(planned_precision(config))
        check_aligned(config.model)
    if args.flops_budget is None:
        args.flops_budget = state.inputs("ladder").get("--flops-budget")
    if args.flops_budget is None and "ladder" in steps:
        raise UserError(
            "give --flops-budget: the FLOPs of all small runs together (6 N_active D); 1% of the large run's FLOPs is "
            f"{_large_flops(config) / 100:.1g}"
        )
    again = steps[steps.index(args.redo) :] if args.redo in steps else ()
    trains = "run" in steps and ("run" not in state.steps or "run" in again)
    submits = "launch" in steps and (not state.facts("launch").get("submitted") or "launch" in again)
    if (args.slurm and trains) or (args.submit and submits):
        from launchers.slurm import commands

        commands.queue()


def planned_precision(config: RunConfig) -> str:
    """The precision that the large run is planned in. The small runs say nothing about training in FP8, so it is planned
    only if the recipe asks for it."""
    return "fp8" if config.precision.compute == "fp8" else "bf16"


def _large_flops(config: RunConfig) -> float:
    from qwen_moe.models.flops import count_parameters

    return 6.0 * count_parameters(config.model).non_vocabulary_activated * config.training.train_tokens

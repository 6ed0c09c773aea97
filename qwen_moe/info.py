"""`qwen-moe info NAME` prints parameters, FLOPs per token and bytes of a preset, recipe or saved model."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.config import ModelConfig, RunConfig, load_config, parse_model, stage_runs
from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.config.presets import PRESETS, is_preset, preset_values
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError
from qwen_moe.models.flops import count_parameters, flops_per_token, training_bytes, training_flops
from qwen_moe.options import whole

SEQUENCE_LENGTH, COMPUTE, MASTER = 4096, "bf16", "fp32"  # of a model that no recipe trains


def resolve_model(name: str) -> ModelConfig:
    """The ModelConfig behind ``name``: a preset, a recipe (.yaml), a Hugging Face directory or a checkpoint."""
    if name in PRESETS:
        return parse_model({"preset": name}, name)
    if not name.strip() or "\0" in name:
        raise UserError(
            f"{name!r} names no model: give a preset ({', '.join(PRESETS)}), recipe, directory or checkpoint"
        )
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_config(path).model
    for file in ("config.json", "model_config.json"):
        if not (path / file).is_file():
            continue
        values = json_object(read_text(path / file, "the model's", "another directory"), str(path / file))
        if file == "model_config.json":
            return parse_model(values, str(path / file))
        from qwen_moe.checkpoint.huggingface.config import model_config_from_hf

        return model_config_from_hf(values, str(path / file))
    if is_preset(name):
        return parse_model({"preset": name}, name)
    if path.exists():
        raise UserError(f"{path} holds no config.json (Hugging Face) and no model_config.json (checkpoint)")
    preset_values(name)  # raises, naming the nearest preset
    raise AssertionError


def describe(config: ModelConfig, sequence_length: int, compute: str, master: str) -> dict[str, Any]:
    """Everything the verb prints, as plain values."""
    flops = flops_per_token(config, sequence_length)
    return {
        "model": config.model_dump(mode="json"),
        "parameters": asdict(count_parameters(config)),
        "sequence_length": sequence_length,
        "forward_flops_per_token": asdict(flops) | {"total": flops.forward},
        "training_flops_per_token": flops.training,
        "training_bytes": {"compute": compute, "master": master} | asdict(training_bytes(config, compute, master)),
    }


def describe_stages(config: RunConfig) -> list[dict[str, Any]]:
    """The stages of a recipe: their steps, lengths, bases of RoPE, and shares of the run's FLOPs."""
    whole = training_flops(config)
    found = []
    for run in stage_runs(config):
        per_token = flops_per_token(run.model, run.data.sequence_length).training
        found.append(
            {
                "name": run.place.name,
                "steps": run.train_steps,
                "tokens": run.train_steps * run.tokens_per_step,
                "sequence_length": run.data.sequence_length,
                "long_share": run.data.long_share,
                "rope_theta": run.model.rope_theta,
                "global_batch_size": run.training.global_batch_size,
                "learning_rate": run.optimizer.learning_rate,
                "parallel": {axis: getattr(run.parallel, axis) for axis in ("tp", "pp", "cp", "ep", "etp")},
                "training_flops_per_token": per_token,
                "share_of_flops": per_token * run.train_steps * run.tokens_per_step / whole,
            }
        )
    return found


def _amount(value: float, digits: int, large: str, small: str) -> str:
    """``value`` in billions, or below a tenth of one in millions: `0.536 M` of parameters, not `0.001 B`."""
    scale, unit = (1e9, large) if value >= 1e8 else (1e6, small)
    return f"{value / scale:.{digits}f} {unit}"


def _text(name: str, facts: dict[str, Any]) -> str:
    model, counts, size = facts["model"], facts["parameters"], facts["training_bytes"]
    lines = [f"{name} ({model['family']})"]
    shape = [
        f"{counted(model['num_hidden_layers'], 'layer')} of {model['hidden_size']}",
        counted(model["num_attention_heads"], "head"),
    ]
    kv_heads = model["num_key_value_heads"]
    shape.append(f"{kv_heads} KV head{'' if kv_heads == 1 else 's'} of {model['head_dim']}")
    if model["num_experts"]:
        shape.append(
            f"{model['num_experts_per_tok']} of {counted(model['num_experts'], 'expert')} of "
            f"{model['moe_intermediate_size']}"
        )
    if model["shared_expert_intermediate_size"]:
        shape.append(f"shared expert of {model['shared_expert_intermediate_size']}")
    lines.append("  " + ", ".join(shape) + f", vocabulary {model['vocab_size']:,}")
    if model["criteria"]:
        lines.append(f"  a reward model, which scores by {', '.join(model['criteria'])}")
    for label, kind in (("parameters", ""), ("  non-vocabulary", "non_vocabulary_")):
        total, activated = (_amount(counts[kind + name], 3, "B", "M") for name in ("total", "activated"))
        lines.append(f"  {label:18s}{total:>12s} total, {activated} activated")
    forward = facts["forward_flops_per_token"]
    lines.append(
        f"  FLOPs per token   {_amount(facts['training_flops_per_token'], 3, 'G', 'M'):>12s} in training, "
        f"{_amount(forward['total'], 3, 'G', 'M')} forward (sequences of {facts['sequence_length']}, causal)"
    )
    for part, value in forward.items():
        if part != "total" and value:
            lines.append(f"    {part.replace('_', ' '):22s}{value / forward['total']:7.1%}")
    for stage in facts.get("stages", []):
        lines.append(
            f"  stage             {stage['name']}: {counted(stage['steps'], 'step')}, {stage['tokens']:,} tokens in "
            "sequences of "
            f"{stage['sequence_length']:,}, RoPE base {stage['rope_theta']:g}, "
            f"{_amount(stage['training_flops_per_token'], 3, 'G', 'M')}FLOPs per token, {stage['share_of_flops']:.0%} of all"
        )
    lines.append(f"  bytes, one process, compute {size['compute']}, master {size['master']}, activations not counted")
    for part in ("weights", "master_weights", "gradients", "optimizer"):
        lines.append(f"    {part.replace('_', ' '):22s}{_amount(size[part], 2, 'GB', 'MB'):>13s}")
    return "\n".join(lines)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("info", help="print parameters, FLOPs per token and bytes of a model")
    parser.add_argument(
        "name", nargs="?", help=f"a preset ({', '.join(PRESETS)}), recipe.yaml, HF directory or checkpoint"
    )
    parser.add_argument(
        "--seq-len",
        type=whole(1, LARGEST_SIZE),
        help=f"sequence length for attention's FLOPs (default: the recipe's, otherwise {SEQUENCE_LENGTH})",
    )
    for name, otherwise in (("compute", COMPUTE), ("master", MASTER)):
        parser.add_argument(
            f"--{name}",
            choices=("bf16", "fp32", "fp64"),
            help=f"{name} dtype (default: the recipe's, otherwise {otherwise})",
        )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--machine",
        action="store_true",
        help="describe this machine: cores, memory, how it multiplies matrices and how fast",
    )
    schedule = parser.add_argument_group("pipeline schedules")
    schedule.add_argument(
        "--schedule",
        nargs="?",
        const="",
        help="draw a schedule (1f1b, interleaved_1f1b, zbv, dualpipev; without a name, the recipe's) with its idle share "
        "and peak activations per rank",
    )
    schedule.add_argument("--pp", type=whole(1, 4096), help="pipeline ranks (default: the recipe's)")
    schedule.add_argument(
        "--micro-batches",
        type=whole(1, 100_000),
        help="micro-batches per step and data-parallel rank (default: the recipe's)",
    )
    schedule.add_argument(
        "--stages-per-rank",
        type=whole(0, 10_000),
        default=0,
        help="pipeline stages of a rank (default: 1 for 1f1b, 2 for the others)",
    )
    schedule.add_argument("--output", type=Path, help="file of the schedule's picture (default: schedule.png)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    if args.schedule is not None:
        return _schedule(args)
    if args.machine:
        from qwen_moe.machine import machine_facts, machine_text

        about = machine_facts()
        sys.stdout.write((json.dumps(about, indent=1) if args.json else machine_text(about)) + "\n")
        return 0
    if args.name is None:
        raise UserError(
            "give a preset, recipe.yaml, HF directory or checkpoint, or --schedule NAME --pp N --micro-batches M"
        )
    recipe = load_config(Path(args.name)) if Path(args.name).suffix in (".yaml", ".yml") else None
    facts = describe(resolve_model(args.name) if recipe is None else recipe.model, *_used(recipe, args))
    if recipe is not None and recipe.stages:
        facts["stages"] = describe_stages(recipe)
    sys.stdout.write((json.dumps(facts, indent=1) if args.json else _text(args.name, facts)) + "\n")
    return 0


def _used(recipe: RunConfig | None, args: argparse.Namespace) -> tuple[int, str, str]:
    """(sequence length, compute dtype, master dtype): as given, or else the recipe's, or else the defaults."""
    length, compute, master = SEQUENCE_LENGTH, COMPUTE, MASTER
    if recipe is not None:
        length, master = recipe.data.sequence_length, recipe.precision.master
        # The operands of FP8 matmuls are made from weights in bf16.
        compute = "bf16" if recipe.precision.compute == "fp8" else recipe.precision.compute
    return args.seq_len or length, args.compute or compute, args.master or master


def _schedule(args: argparse.Namespace) -> int:
    from qwen_moe.packages import check_installed, missing_text
    from qwen_moe.schedule_picture import describe_schedule, draw_schedule, schedule_text

    if args.output is not None:
        check_installed(f"--output {args.output}", "matplotlib", otherwise="leave --output out for the figures alone")
    recipe = load_config(Path(args.name)) if args.name and Path(args.name).suffix in (".yaml", ".yml") else None
    if args.name and recipe is None:
        raise UserError(f"--schedule reads a recipe.yaml, not {args.name!r}: give one, or --pp and --micro-batches")
    schedule = describe_schedule(
        recipe,
        schedule=args.schedule or (recipe.parallel.schedule if recipe is not None else ""),
        pp=args.pp,
        micro_batches=args.micro_batches,
        per_rank=args.stages_per_rank,
    )
    picture = args.output or Path("schedule.png")
    if missing := missing_text("matplotlib"):
        print(f"no picture: {missing}", file=sys.stderr)
    else:
        draw_schedule(schedule, picture)
    shown = None if missing else str(picture)
    if args.json:
        sys.stdout.write(json.dumps(schedule.facts() | {"picture": shown}, indent=1) + "\n")
    else:
        sys.stdout.write(schedule_text(schedule) + (f"\n  picture           {shown}\n" if shown else "\n"))
    return 0

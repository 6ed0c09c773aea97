"""The verb `qwen-moe convert upcycle`: its options, and what it prints."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from launchers.counted import counted
from qwen_moe.checkpoint.upcycle.settings import Method, Plan, Router, Scale, Std, UpcycleSettings, What
from qwen_moe.options import LARGEST_SEED, number, whole

if TYPE_CHECKING:
    from qwen_moe.checkpoint.upcycle.convert import Upcycled


def register(verbs: Any) -> None:
    """Add `upcycle` to the verbs of `convert`."""
    verb = verbs.add_parser("upcycle", help="dense model -> mixture-of-experts checkpoint")
    verb.add_argument("source", type=Path, metavar="DENSE", help="a Hugging Face directory, a checkpoint, or a run")
    verb.add_argument("target", type=Path, metavar="MOE_CHECKPOINT", help="new or empty")
    verb.add_argument("--experts", type=whole(1), required=True, metavar="E", dest="num_experts", help="routed experts")
    verb.add_argument("--top-k", type=whole(1), required=True, metavar="K", help="experts that a token visits")
    verb.add_argument(
        "--expert-size", type=whole(1), metavar="F", help="intermediate size of an expert (default: the dense model's)"
    )
    verb.add_argument(
        "--shared-expert", type=whole(1), default=0, metavar="S", help="intermediate size of the shared expert"
    )
    verb.add_argument("--method", choices=get_args(Method), default="fine_grained", help="default: fine_grained")
    verb.add_argument(
        "--norm-topk-prob",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the weights of a token's experts add up to 1 (default), or are their probabilities among all experts",
    )
    verb.add_argument("--dense-layers", metavar="0,1", type=_layers, default=(), help="layers that stay dense")
    verb.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="of all random numbers (default: 0)")
    _register_choices(verb)
    verb.add_argument("--dry-run", action="store_true", help="check and print everything, write nothing")
    verb.add_argument("--json", action="store_true", help="print one JSON document")
    verb.set_defaults(func=_run)


def _register_choices(verb: argparse.ArgumentParser) -> None:
    """Options for what published recipes leave open."""
    share = number(least=0, most=1)
    verb.add_argument(
        "--reinitialize",
        type=share,
        metavar="SHARE",
        help="share of each expert that is drawn anew (default: 0.5 for fine_grained, otherwise 0)",
    )
    verb.add_argument("--reinitialize-what", choices=get_args(What), default="indices", help="default: indices")
    verb.add_argument("--reinitialize-std", choices=get_args(Std), default="replaced", help="default: replaced")
    verb.add_argument("--reinitialize-shared", action="store_true", help="also draw a share of the shared expert anew")
    verb.add_argument("--router", choices=get_args(Router), help="default: random; groups where same_function needs it")
    verb.add_argument("--scale", choices=get_args(Scale), default="match", help="of down projections (default: match)")
    verb.add_argument(
        "--shared-share",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="how much of the feed-forward's output the shared expert gives at first (default: 0.5)",
    )


def _layers(text: str) -> tuple[int, ...]:
    return tuple(whole()(part) for part in text.split(",")) if text.strip() else ()


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.checkpoint.upcycle.convert import upcycle

    settings = UpcycleSettings(**{field.name: getattr(args, field.name) for field in fields(UpcycleSettings)})
    found = upcycle(args.source, args.target, settings, dry_run=args.dry_run, progress=not args.dry_run)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(_document(found)))
    else:
        print("\n".join(_lines(found)))
    return 0


def _document(found: "Upcycled") -> dict[str, Any]:
    plan = found.plan
    chosen = asdict(plan.settings) | {
        "expert_size": plan.expert_size,
        "reinitialize": plan.reinitialize,
        "router": plan.router,
    }
    return {
        "source": found.source,
        "target": found.target,
        "dry_run": found.dry_run,
        "settings": chosen,
        "copies": plan.copies,
        "discarded": plan.discarded,
        "routed_scale": plan.routed_scale,
        "tensors": {"unchanged": found.unchanged, "cut": found.cut, "new": found.new},
        "bytes": found.bytes,
        "parameters": {"before": asdict(found.before), "after": asdict(found.after)},
        "model": found.model,
        "notes": list(found.notes),
    }


def _lines(found: "Upcycled") -> list[str]:
    plan, before, after = found.plan, found.before, found.after
    state = "nothing was written (--dry-run)" if found.dry_run else "written"
    dense = "".join(f", feed-forward of layer {layer}" for layer in plan.moe.mlp_only_layers)
    gates = ", gates of shared experts" if plan.moe.features.shared_expert else ""
    return [
        f"{found.target}: {plan.moe.family} from {found.source} ({plan.dense.family}), {found.bytes / 1e6:.1f} MB, {state}",
        f"  unchanged: {counted(found.unchanged, 'tensor')} (attention, norms, embedding, head{dense})",
        *(f"  {line}" for line in _feed_forward(plan)),
        f"  new: {counted(found.new, 'tensor')} (routers{gates})",
        f"parameters: {before.total:,} -> {after.total:,}",
        f"active for a token: {before.activated:,} -> {after.activated:,}",
        "what published recipes leave open, as chosen here (docs/upcycling.md gives the reasons):",
        *(f"  {line}" for line in _choices(plan)),
        "train it with any recipe:",
        f"  qwen-moe train RECIPE {shlex.quote(f'checkpoint.load_from={found.target}')} "
        + shlex.quote(f"model={json.dumps(found.model)}"),
    ]


def _feed_forward(plan: Plan) -> list[str]:
    width, size, moe = plan.dense.intermediate_size, plan.expert_size, plan.moe
    copies = f"{plan.copies} {'copy' if plan.copies == 1 else 'copies'} of the feed-forward ({width:,} indices)"
    how = ", each shuffled, cut in turn" if plan.shuffles else ""
    rest = f"; the last {plan.discarded:,} indices are discarded" if plan.discarded else ""
    lines = [f"routed experts: {moe.num_experts} of {size:,} in each MoE layer, from {copies}{how}{rest}"]
    if moe.shared_expert_intermediate_size:
        whole_copies, part = divmod(moe.shared_expert_intermediate_size, width)
        pieces = [f"{whole_copies} whole"] if whole_copies else []
        pieces += [f"a random part of {part:,}"] if part else []
        lines.append(f"shared expert: {moe.shared_expert_intermediate_size:,} indices ({' and '.join(pieces)})")
    return lines


def _choices(plan: Plan) -> list[str]:
    settings, size = plan.settings, plan.expert_size
    lines = [f"--router {plan.router}"]
    if settings.scale == "none":
        lines.append("--scale none: down projections as they are")
    elif plan.moe.features.shared_expert:
        share = settings.shared_share
        gives = f"at first the shared expert gives {share:g} of the feed-forward's output, the routed ones the rest"
        lines.append(f"--scale match --shared-share {share:g}: {gives}")
    else:
        lines.append(f"--scale match: down projections of experts x {plan.routed_scale:.4g}")
    if plan.reinitialize:
        count = f"{plan.reinitialized(size):,} of {size:,} indices of each expert, the same in gate, up and down"
        if settings.reinitialize_what == "elements":
            count = f"{plan.reinitialize:g} of the elements of each matrix of each expert"
        lines.append(f"--reinitialize {plan.reinitialize:g} --reinitialize-what {settings.reinitialize_what}: {count}")
        lines.append(f"--reinitialize-std {settings.reinitialize_std}")
        if plan.moe.features.shared_expert:
            said = "re-initialized too" if settings.reinitialize_shared else "not re-initialized"
            lines.append(f"the shared expert is {said}")
    lines.append(f"--{'' if settings.norm_topk_prob else 'no-'}norm-topk-prob --seed {settings.seed}")
    return lines

"""Generation by qwen-moe against transformers' `generate`, and many prompts at once against one after another.

    python benchmarks/generate.py [--dtype fp32 bf16] [--rounds 5] [--json]

Both sides have the same weights and prompts of 128 tokens, draw 64 tokens greedily and take turns: A B C A B C ... in one
process, where A and B are qwen-moe with and without --compile. Reported are medians of seconds and of the ratios turn by
turn, for batches of 1 and 16: of whole texts, and of new tokens without the prompt (by a second run of 4 tokens). The tokens
must be the same in fp32 (in bf16 the two round differently; the share that agrees is shown). Then 32 prompts of 32 to 128
tokens at once against one after another, both by qwen-moe. The shape is that of `benchmarks/train_step.py`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.train_step import SHAPE, reference_config
from parallel.threads import limit_threads
from qwen_moe.generation.engine import Engine
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model

PROMPT, NEW = 128, 64
FEW = 4  # new tokens of the run that tells the time of the prompt
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def theirs(ours: DecoderLM, experts: str) -> Any:
    """transformers' model with the weights of ``ours``."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = ours.config
    hf_config = transformers.Qwen2MoeConfig(
        **{key: value for key, value in SHAPE.items() if key != "family"},
        decoder_sparse_step=1,
        norm_topk_prob=config.norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    model = transformers.Qwen2MoeForCausalLM(hf_config)
    state = {
        name: tensor.flatten(1, 2) if name.endswith("gate_up_proj") else tensor
        for name, tensor in ours.state_dict().items()
        if not name.endswith("expert_bias")
    }
    model.load_state_dict(state)
    return model.to(ours.head_weight.dtype).eval()


def seconds_of(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def against_transformers(dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    model = build_model(reference_config(), 0, DTYPES[dtype]).eval()
    engines = {
        "compiled": Engine(LocalRunner(model, compiled=True), model.config),
        "eager": Engine(LocalRunner(model), model.config),
    }
    prompts = torch.randint(0, SHAPE["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(0))

    def our_tokens(engine: Engine, new: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=new, temperature=0)
        return [answers[0].tokens for answers in engine.generate(prompts.tolist(), sampling)]

    def tokens_of(peer: Any, new: int) -> list[list[int]]:
        arguments = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            return peer.generate(prompts, attention_mask=torch.ones_like(prompts), **arguments)[:, PROMPT:].tolist()

    trials = {}
    # Not "batched_mm": it copies expert weights per token, 12 GB for a batch of 16 prompts.
    for experts in ("grouped_mm", "eager"):
        peer = theirs(model, experts)
        try:
            tokens_of(peer, NEW)
            trials[experts] = (seconds_of(partial(tokens_of, peer, NEW)), peer)
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"transformers' {experts} experts do not run here: {error}")
    experts = min(trials, key=lambda name: trials[name][0])
    sides: dict[str, Callable[[int], list[list[int]]]] = {
        name: partial(our_tokens, engine) for name, engine in engines.items()
    }
    sides["transformers"] = partial(tokens_of, trials[experts][1])
    first = {name: side(NEW) for name, side in sides.items()}
    turns = [
        {name: (seconds_of(partial(side, FEW)), seconds_of(partial(side, NEW))) for name, side in sides.items()}
        for _ in range(rounds)
    ]

    def same(name: str) -> float:
        pairs = zip(first[name], first["transformers"], strict=True)
        return sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True)) / (batch * NEW)

    def ratio(name: str, of: Callable[[tuple[float, float]], float]) -> float:
        return statistics.median(of(turn["transformers"]) / of(turn[name]) for turn in turns)

    return {
        "dtype": dtype,
        "batch": batch,
        "transformers_experts": experts,
        "same_tokens": {name: same(name) for name in engines},
        "seconds": {name: statistics.median(turn[name][1] for turn in turns) for name in sides},
        "ms_per_step": {
            name: 1000 * statistics.median((turn[name][1] - turn[name][0]) / (NEW - FEW) for turn in turns)
            for name in sides
        },
        "speedup": {name: ratio(name, lambda pair: pair[1]) for name in engines},
        "speedup_of_new_tokens": {name: ratio(name, lambda pair: pair[1] - pair[0]) for name in engines},
    }


def at_once(dtype: str, rounds: int, prompts: int = 32) -> dict[str, Any]:
    model = build_model(reference_config(), 0, DTYPES[dtype]).eval()
    engine, sampling = Engine(LocalRunner(model), model.config), Sampling(max_new_tokens=NEW, temperature=0)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, PROMPT + 1, (prompts,), generator=generator).tolist()
    texts = [torch.randint(0, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]

    def together() -> None:
        engine.generate(texts, sampling)

    def one_by_one() -> None:
        for text in texts:
            engine.generate([text], sampling)

    together()
    pairs = [(seconds_of(together), seconds_of(one_by_one)) for _ in range(rounds)]
    return {
        "dtype": dtype,
        "prompts": prompts,
        "tokens_per_second": prompts * NEW / statistics.median(a for a, _ in pairs),
        "speedup": statistics.median(b / a for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    limit_threads()
    results = []
    for dtype in args.dtype:
        results += [against_transformers(dtype, batch, args.rounds) for batch in (1, 16)]
        results.append(at_once(dtype, max(1, args.rounds // 2)))
        if not args.json:
            for result in results[-3:]:
                print(result, flush=True)
    if args.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

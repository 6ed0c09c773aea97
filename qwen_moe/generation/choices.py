"""Log-probabilities of given answers: each prompt is read once, and all its answers continue it from the cache.

Shapes: P prompts, C choices, V vocabulary.
"""

from collections.abc import Sequence

import torch

from qwen_moe.errors import UserError
from qwen_moe.generation.cache import Chunk, SequenceCache, read_prompts
from qwen_moe.generation.engine import NOT_FINITE, Engine, batches, check_prompt
from qwen_moe.generation.sampling import Sampling


def log_probs_of_choices(
    engine: Engine, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The log-probability of each of ``choices`` (token ids) as what follows each of ``prompts``, summed over its tokens:
    ``[P][C]``.

    Prompts of similar lengths are read in one pass. If every choice is one token, this pass is all. Otherwise one pass for
    each further token reads it for all choices. Raises UserError for tokens that the model does not know, texts that it does
    not reach, and results that are NaN.
    """
    _check_choices(choices, engine.config.vocab_size)
    steps = max(map(len, choices)) - 1
    for prompt in prompts:
        check_prompt(prompt, steps + 1, engine.config)
    # What the caches must hold, as of answers that are drawn.
    room = Sampling(max_new_tokens=steps + 1, samples=len(choices) if steps else 1)
    found: dict[int, list[float]] = {}
    for batch in batches([len(prompt) for prompt in prompts], room, engine.limits):
        rows = _read(engine, [prompts[i] for i in batch], choices, steps)
        if not bool(rows.isfinite().all()):
            raise UserError(NOT_FINITE)
        found |= dict(zip(batch, rows.tolist(), strict=True))
    engine.runner.finish()
    return [found[i] for i in range(len(prompts))]


def _check_choices(choices: Sequence[Sequence[int]], vocab_size: int) -> None:
    for choice in choices:
        if not choice:
            raise UserError("an answer is empty: give at least one token")
        if not 0 <= min(choice) <= max(choice) < vocab_size:
            wrong = max(choice) if max(choice) >= vocab_size else min(choice)
            raise UserError(
                f"an answer has token {wrong} but the model's vocabulary has {vocab_size}: the tokenizer belongs to "
                "another model"
            )


def _read(
    engine: Engine, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], steps: int
) -> torch.Tensor:
    """``[P, C]``, on the CPU, in float32 or in float64 of a model in float64."""
    runner, lengths = engine.runner, [len(prompt) for prompt in prompts]
    samples = len(choices) if steps else 1
    reader, alone = engine.reader(max(lengths) + steps + 1)
    cache = SequenceCache(
        engine.rope,
        lengths,
        samples=samples,
        new_tokens=steps,
        reader=reader,
        alone=alone,
        last_layer=engine.config.num_hidden_layers - 1,
    )

    def read(ids: torch.Tensor, wanted: torch.Tensor, chunks: list[Chunk]) -> torch.Tensor:
        return runner.logits(ids, cache, wanted)

    logits = read_prompts(prompts, cache, engine.limits.chunk, runner.device, read)
    found = _log_probs(logits, [[choice[0] for choice in choices]])
    for step in range(1, steps + 1):
        cache.begin_step(runner.device)
        # Of a choice that has ended, any token is read and nothing is added.
        given = torch.tensor([choice[min(step, len(choice)) - 1] for choice in choices] * len(prompts))
        logits = runner.logits(given.to(runner.device), cache, torch.arange(len(given), device=runner.device))
        wanted = [[choice[min(step, len(choice) - 1)]] for choice in choices] * len(prompts)
        more = _log_probs(logits, wanted).view_as(found)
        ended = torch.tensor([step >= len(choice) for choice in choices], device=more.device)
        found = found + more.masked_fill(ended, 0)
    _, found = runner.share(torch.zeros_like(found, dtype=torch.int64), found)
    return found.cpu()


def _log_probs(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """``[N, V]`` -> the log-probabilities ``[N, n]`` of n tokens in each row, or of the same ones in all rows; zeros where
    another rank has the logits."""
    index = torch.tensor(tokens, device=logits.device).expand(len(logits), -1)
    if not logits.shape[1]:
        return logits.new_zeros(index.shape, dtype=torch.float64)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.gather(1, index) - wide.logsumexp(1, keepdim=True)

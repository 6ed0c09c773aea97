"""Continues one text with a checkpoint: `generate_text`."""

import time
from dataclasses import dataclass
from pathlib import Path

from qwen_moe.config import ModelConfig
from qwen_moe.generation.engine import Completion, check_prompt
from qwen_moe.generation.extension import extended
from qwen_moe.generation.open import HowToRead, Opened, on_one_device
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.tokenizer import text_tokens


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation. ``finish_reason`` is "stop" at an end token or stop string and "length" at
    max_new_tokens."""

    prompt: str
    completion: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    dtype: str
    seconds: float


def answer_text(opened: Opened, answer: Completion, stop: tuple[str, ...]) -> str:
    """The text of an answer, without its end token and from the first stop string on."""
    tokens = answer.tokens
    if tokens and tokens[-1] in opened.end_tokens:
        tokens = tokens[:-1]
    text = opened.text(tokens)
    return text[: min([text.find(end) for end in stop if end in text], default=len(text))]


def check_lengths(config: ModelConfig, how: HowToRead, prompts: list[list[int]], max_new_tokens: int) -> int:
    """The longest text, prompt and answer together. Raises UserError before weights are read, if the model does not know a
    token or does not reach."""
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    reaching = extended(config, how.extension, longest)
    for prompt in prompts:
        check_prompt(prompt, max_new_tokens, reaching)
    return longest


def generate_text(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    how: HowToRead | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Continuation:
    """Continue ``prompt`` with the model and tokenizer of a checkpoint, run or Hugging Face directory.

    ``dtype`` None: the stored dtype, or the run's compute dtype. ``device`` None: the GPU if there is one. Raises
    UserError.
    """
    opened, how = Opened(directory), how or HowToRead()
    tokens = text_tokens(opened.tokenizer, prompt)
    longest = check_lengths(opened.config, how, [tokens], sampling.max_new_tokens)
    engine = opened.engine(how, longest, on_one_device(dtype, device))
    begin = time.perf_counter()
    answer = engine.generate([tokens], sampling)[0][0]
    return Continuation(
        prompt=prompt,
        completion=answer_text(opened, answer, sampling.stop),
        prompt_tokens=len(tokens),
        new_tokens=len(answer.tokens),
        finish_reason=answer.finish_reason,
        dtype=str(engine.runner.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - begin,
    )

"""Passkey retrieval (arXiv 2305.16300, section 4.3; github.com/epfml/landmark-attention, llama/run_test.py)."""

from qwen_moe.evaluation.scoring import number_equals
from qwen_moe.evaluation.tasks.haystack import NOISE
from qwen_moe.evaluation.tasks.task import Draft, Encode, Question, Task

TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there."  # noqa: E501
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
_NOISE = tuple(f"{sentence}." for sentence in NOISE.rstrip(".").split(". "))


def _noise(count: int) -> str:
    """``count`` sentences; after the fifth, the first comes again."""
    return " ".join((_NOISE * -(-count // len(_NOISE)))[:count])


def _draft(digits: int, question: Question) -> Draft:
    key = str(question.rng.randint(10 ** (digits - 1), 10**digits - 1))
    depth = question.depth if question.depth is not None else question.rng.random()

    def text(count: int) -> str:
        before = round(depth * count)
        lines = [TASK, _noise(before), KEY.format(key=key), _noise(count - before), QUESTION]
        return "\n".join(lines)

    return Draft(text=text, answers=(key,), least=0)


def passkey_task(digits: int, encode: Encode) -> Task:
    """Completions have room for the key, the space before it and the full stop that ends it."""
    added = len(encode(""))  # what the tokenizer puts around every text
    longest = max(len(encode(digit)) - added for digit in "0123456789")
    return Task(
        name="passkey",
        new_tokens=digits * longest + 2,
        unit="a noise sentence",
        score=number_equals,
        draft=lambda question: _draft(digits, question),
    )

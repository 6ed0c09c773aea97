"""Passkey retrieval (arXiv 2305.16300, section 4.3; github.com/epfml/landmark-attention, llama/run_test.py)."""

from qwen_moe.data.passkey import noise, prompt
from qwen_moe.evaluation.scoring import number_equals
from qwen_moe.evaluation.tasks.task import Draft, Encode, Question, Task


def _draft(digits: int, question: Question) -> Draft:
    key = str(question.rng.randint(10 ** (digits - 1), 10**digits - 1))
    depth = question.depth if question.depth is not None else question.rng.random()

    def text(count: int) -> str:
        before = round(depth * count)
        return prompt(noise(before), key, noise(count - before))

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

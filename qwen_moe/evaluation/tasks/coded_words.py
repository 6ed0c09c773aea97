"""RULER's frequent words (github.com/NVIDIA/RULER, scripts/data/synthetic/freq_words_extraction.py)."""

import math
import string
from random import Random

from qwen_moe.evaluation.scoring import share_found
from qwen_moe.evaluation.tasks.task import Draft, Question, Task

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text? Answer: According to the coded text above, the three most "
    "frequently appeared words are:"
)
NEW_TOKENS = 50
LETTERS = 6
NOISE = "..."  # the most frequent word
ZETA_2 = math.pi**2 / 6
# From this many words on, the fourth word comes more often than the fifth, which is no answer.
LEAST = 53


def counts(total: int, vocabulary: int) -> list[int]:
    """How often the words come, the most frequent first: the zeta distribution with exponent 2, rounded down."""
    found = []
    for rank in range(1, vocabulary + 1):
        count = int(total * rank**-2.0 / ZETA_2)
        if count == 0:
            break
        found.append(count)
    return found


def _vocabulary(size: int, rng: Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < size:
        found["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    return list(found)


def _draft(question: Question) -> Draft:
    # As in the original, a word for every 50 tokens; never too few to ask about.
    size = max((question.length - NEW_TOKENS) // 50, 5)
    words = [NOISE, *_vocabulary(size - 1, question.rng)]
    order_seed = question.rng.getrandbits(64)

    def text(count: int) -> str:
        listed = [word for word, times in zip(words, counts(count, size)) for _ in range(times)]
        Random(order_seed).shuffle(listed)
        return TEMPLATE.format(context=" ".join(listed))

    return Draft(text=text, answers=tuple(words[1:4]), least=LEAST)


def coded_words_task() -> Task:
    return Task(name="fwe", new_tokens=NEW_TOKENS, unit="a coded word", score=share_found, draft=_draft)

"""RULER's common words (github.com/NVIDIA/RULER, scripts/data/synthetic/common_words_extraction.py)."""

from random import Random

from qwen_moe.evaluation.scoring import share_found
from qwen_moe.evaluation.tasks.task import Draft, Question, Task
from qwen_moe.evaluation.tasks.word_list import ADJECTIVES, NOUNS, VERBS

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10
NEW_TOKENS = 120
# From this length on, words are repeated more often, and the solved example is longer.
LONG = 4096
WORDS = tuple(sorted({*NOUNS, *ADJECTIVES, *VERBS}))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


class _List:
    """A list of words in which the first ten come ``often`` times and the others ``seldom`` times."""

    def __init__(self, rng: Random, often: int, seldom: int) -> None:
        self.often, self.seldom = often, seldom
        self.words = rng.sample(WORDS, len(WORDS))
        self.pairs_seed, self.order_seed = rng.getrandbits(64), rng.getrandbits(64)
        self.pairs: list[str] = []

    def different(self, count: int) -> list[str]:
        """The first ``count`` different words. When the list has too few, pairs of words follow it."""
        if count > len(self.words) and not self.pairs:
            every = [adjective + noun for adjective in ADJECTIVES for noun in NOUNS]
            self.pairs = sorted(set(every) - set(self.words))
            Random(self.pairs_seed).shuffle(self.pairs)
        return (self.words + self.pairs)[:count]

    def text(self, count: int) -> str:
        words = self.different(count)
        listed = words[:COMMON] * self.often + words[COMMON:] * self.seldom
        Random(self.order_seed).shuffle(listed)
        return TEMPLATE.format(context=_numbered(listed))


def _draft(question: Question) -> Draft:
    long = question.length >= LONG
    example = _List(question.rng, 10, 3) if long else _List(question.rng, 3, 1)
    solved = f"{example.text(40 if long else 20)} {_numbered(example.words[:COMMON])}\n"
    problem = _List(question.rng, 30, 3) if long else _List(question.rng, 6, 1)
    # The original stops at 10 words, where all are equally common.
    return Draft(
        text=lambda count: solved + problem.text(count), answers=tuple(problem.words[:COMMON]), least=COMMON + 1
    )


def common_words_task() -> Task:
    return Task(name="cwe", new_tokens=NEW_TOKENS, unit="a word and its repetitions", score=share_found, draft=_draft)

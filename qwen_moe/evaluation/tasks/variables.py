"""RULER's variable tracking: one chain of four hops (github.com/NVIDIA/RULER, data/synthetic/variable_tracking.py)."""

import string
from itertools import pairwise
from random import Random

from qwen_moe.evaluation.scoring import share_found
from qwen_moe.evaluation.tasks.haystack import NOISE
from qwen_moe.evaluation.tasks.task import Draft, Encode, Question, Task, fit

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value "
    "{value}, they are: "
)
HOPS = 4
NEW_TOKENS = 30
# Letters of a name, in the question and in the solved example before it; the most tokens of that example.
LETTERS, EXAMPLE_LETTERS, EXAMPLE_TOKENS = 5, 3, 500


def _names(count: int, letters: int, rng: Random) -> list[str]:
    """Different names; none is VAR, which introduces a name."""
    found: list[str] = []
    while len(found) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in found and name != "VAR":
            found.append(name)
    return found


def _problem(letters: int, rng: Random) -> Draft:
    """A text with a chain, and the question about it."""
    names = _names(HOPS + 1, letters, rng)
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    places_seed = rng.getrandbits(64)

    def text(count: int) -> str:
        lines = [NOISE] * count
        places = sorted(Random(places_seed).sample(range(count), len(chain)))
        for number, (place, link) in enumerate(zip(places, chain)):
            lines.insert(place + number, link)
        context = "\n".join(lines).replace(". \n", ".\n")
        return TEMPLATE.format(context=context, value=value, count=len(names))

    return Draft(text=text, answers=tuple(names), least=len(chain))


def _example(rng: Random, encode: Encode) -> str:
    problem = _problem(EXAMPLE_LETTERS, rng)
    try:
        size, _ = fit(problem, encode, EXAMPLE_TOKENS)
    except ValueError:  # a tokenizer of long texts, such as one of bytes
        size = problem.least
    return problem.text(size) + " " + " ".join(problem.answers) + "\n"


def _draft(question: Question) -> Draft:
    example = _example(question.rng, question.encode)
    problem = _problem(LETTERS, question.rng)
    return Draft(text=lambda count: f"{example}\n{problem.text(count)}", answers=problem.answers, least=problem.least)


def variables_task() -> Task:
    return Task(name="vt", new_tokens=NEW_TOKENS, unit="five noise sentences", score=share_found, draft=_draft)

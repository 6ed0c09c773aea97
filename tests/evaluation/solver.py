"""A stand-in for a model: it reads the prompt's text and solves the task, knowing nothing of how prompts are made."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any


def solve(text: str) -> str:
    """The answer that a perfect model gives; empty for a text without a known question."""
    for end, answer in (
        ("The pass key is", _passkey),
        ("mentioned in the provided text is", _needles),
        ("mentioned in the provided text are", _needles),
        ("they are: ", _variables),
        ("most often in the list are:", _common),
        ("most frequently appeared words are:", _coded),
        ("Answer:", _color),
    ):
        if text.endswith(end):
            return " " + answer(text)
    return ""


def _passkey(text: str) -> str:
    found = re.search(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.", text)
    assert found is not None and found[1] == found[2]
    return f"{found[1]}. What"


def _needles(text: str) -> str:
    asked = re.findall(r"What (?:is|are all) the special magic \w+ for (.+?) mentioned in the provided text\?", text)[
        -1
    ]
    keys = re.split(r", and |, ", asked)
    return ", ".join(value for key in keys for value in re.findall(rf"magic \w+ for {key} is: ([^ ]+)\.", text))


def _variables(text: str) -> str:
    wanted = re.findall(r"assigned the value (\d+) in the text above", text)[-1]
    links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    found = [name for name, value in links if value == wanted]
    for name in found:
        found += [other for other, before in links if before == name]
    return " ".join(found)


def _common(text: str) -> str:
    words = re.findall(r"\d+\. (\w+)", text.split("Below is a numbered list of words.")[-1].split("\nQuestion:")[0])
    return " ".join(word for word, _ in Counter(words).most_common(10))


def _coded(text: str) -> str:
    words = text.split("Find the three most frequently appeared coded words. ")[1].split("\nQuestion:")[0].split()
    assert Counter(words).most_common(1)[0][0] == "..."
    return " ".join(word for word, _ in Counter(words).most_common(4)[1:])


def _color(text: str) -> str:
    name = re.findall(r"What is the color of (\w+)\?", text)[-1]
    return re.findall(rf"The color of {name} is (\w+)\.", text)[0]


class Solver:
    """Solves prompts, but for those that ``misses`` names by their text. ``before`` is called before each completion."""

    def __init__(
        self,
        tokenizer: Any,
        misses: Callable[[str], bool] = lambda text: False,
        before: Callable[[int], None] = lambda count: None,
        reach: int | None = None,
    ) -> None:
        self.tokenizer, self.misses, self.before, self.reach = tokenizer, misses, before, reach
        self.identity = {"model": "solver", "tokenizer": "trained"}
        self.batches: list[tuple[list[int], int]] = []  # lengths of prompts, new tokens

    @property
    def count(self) -> int:
        return sum(len(lengths) for lengths, _ in self.batches)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def complete(
        self, prompts: list[list[int]], length: int, max_new_tokens: int, done: Callable[[int, list[int]], None]
    ) -> None:
        self.batches.append(([], max_new_tokens))
        for index in reversed(range(len(prompts))):  # in any order
            self.before(self.count)
            text = self.decode(prompts[index])
            self.batches[-1][0].append(len(prompts[index]))
            done(index, [] if self.misses(text) else self.encode(solve(text))[:max_new_tokens])

    def reading(self) -> dict[str, float]:
        return {}


def misses_depths(begin: float, end: float) -> Callable[[str], bool]:
    """Texts whose key lies between two depths, 0 being the first letter."""
    return lambda text: begin <= text.index("Remember it.") / len(text) <= end

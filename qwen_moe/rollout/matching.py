"""Rewards that compare the text of an answer with the expected one: `exact`, `contains`, `number`; and code in an answer."""

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

# Letters of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer), or endings at words
# (Korean). A word or a number may begin or end beside them.
_UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0ecd\u1000-\u103f\u1100-\u11ff\u1780-\u17d3\u3005\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_LETTER = rf"[^\W{_UNSPACED}]"
_NUMBER = re.compile(
    rf"(?<!{_LETTER})(?<!\.)"
    r"(?:[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?!\d)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?!\d|[eE][-+]?\d)"
    r"(?:\s?/\s?\d+(?!\d|\.\d))?%?"
    r"|[-+]?\.\d+%?)"
)
_BETWEEN_TERMS = re.compile(rf"(?:(?<={_LETTER})|(?<=[)\]]))(?<![\d.][eE])[-+](?=[\d.])")
_LONGEST_NUMBER = 1000  # digits; longer ones are no answers, and would take long
_FENCE = re.compile(r"```[^\S\n]*([\w+-]*)[^\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def normalized(text: str) -> str:
    """Unicode NFKC, and every run of white space one space, with none at the ends. Case matters."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def wanted(answer: Any) -> list[str]:
    """The texts that are right: ``answer`` is a text, a number, or a list of them."""
    return [str(one) for one in (answer if isinstance(answer, list) else [answer])]


def is_exact(completion: str, answer: Any) -> bool:
    """Whether the normalized completion equals the normalized answer, or one of a list of answers."""
    return normalized(completion) in {normalized(text) for text in wanted(answer)}


def contains(completion: str, answer: Any) -> bool:
    """Whether the normalized completion contains the normalized answer as whole words, or one of a list of answers. Where
    the answer begins or ends with a letter of a script without spaces, a word may begin or end anywhere."""
    text = normalized(completion)
    return any(re.search(_as_words(normalized(one)), text) for one in wanted(answer))


def _as_words(text: str) -> str:
    before = "" if re.match(f"[{_UNSPACED}]", text) else f"(?<!{_LETTER})"
    after = "" if re.search(rf"[{_UNSPACED}]\Z", text) else f"(?!{_LETTER})"
    return before + re.escape(text) + after


def numbers(text: str) -> Iterable[Fraction]:
    """The numbers in ``text``, the last one first: 12, -3.5, 1,234, 2e3, 3/4, 50%. A minus sign after a letter, digit or
    bracket is one between two terms, so that 7-3 has the numbers 7 and 3."""
    text = _BETWEEN_TERMS.sub(" ", text.replace("\u2212", "-"))
    for match in reversed(list(_NUMBER.finditer(text))):
        found = _fraction(match.group())
        if found is not None:
            yield found


def _fraction(text: str) -> Fraction | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    percent, text = text.endswith("%"), "".join(text.rstrip("%").replace(",", "").split())
    value, _, divisor = text.partition("/")
    if divisor and int(divisor) == 0:
        return None
    return Fraction(value) / int(divisor or 1) / (100 if percent else 1)


def number_of(answer: Any) -> Fraction | None:
    """The one number that an expected answer is; None if it is none. Text around it, such as a unit, is allowed."""
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    found = list(numbers(str(answer)))
    return found[0] if len(found) == 1 else None


def is_number(completion: str, answer: Any) -> bool:
    """Whether the last number in the completion equals the answer exactly, as a rational number."""
    return next(iter(numbers(completion)), None) == number_of(answer)


def code_of(completion: str) -> str:
    """The last fenced block of Python, else the last block without a language, else the whole completion."""
    blocks = _FENCE.findall(completion)
    for names in (("python", "py", "python3"), ("",)):
        found = [code for language, code in blocks if language.lower() in names]
        if found:
            return found[-1]
    return completion

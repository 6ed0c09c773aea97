"""The passkey task (arXiv 2305.16300): a number hidden in repeated sentences, and a question for it; documents to train on.

The wording is that of the authors' code (github.com/epfml/landmark-attention, llama/run_test.py), with which LongLoRA and
others also test.
"""

import functools
import random
from itertools import cycle, islice

from launchers.counted import counted
from qwen_moe.errors import UserError

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
    "the important information there."
)
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
INFORMATION = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"

PREFIX = "passkey:"
DIGITS = 5
_LEAST, _MOST = 600, 1_000_000  # characters of a document
_STOP = 0.25  # how likely a document ends after an answer
_ALL = 1 << 30  # characters of all documents
SEPARATOR = "\0"


def noise(sentences: int) -> str:
    """The sentences of `NOISE` again and again, ``sentences`` in all."""
    return " ".join(islice(cycle(NOISE), sentences))


def prompt(before: str, key: str, after: str) -> str:
    """The text that the key ``key`` of digits should follow, after a space; ``before`` and ``after`` are noise."""
    return "\n".join([TASK, before, INFORMATION.format(key=key), after, QUESTION])


def document(rng: random.Random, longest: int) -> str:
    """A prompt with its answer, of at most ``longest`` characters; most ask again after more noise.

    An answer is a few tokens in hundreds. With several in a document, a model learns to find keys from a fraction of the
    tokens. Short documents and short stretches of noise are more frequent than long ones: they are learned first.
    """
    key = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    lines = [TASK, "", INFORMATION.format(key=key)]
    answered = f"{QUESTION} {key}."
    least = len("\n".join([*lines, "", answered]))
    room = int((longest - least) ** rng.random() ** 0.25)
    lines[1] = _some_noise(rng, room, 1.0)
    room -= len(lines[1])
    while True:
        after = _some_noise(rng, room, 0.15)
        lines += [after, answered]
        room -= len(after) + len(answered) + 2  # of noise, after one more question
        if room < 0 or rng.random() < _STOP:
            return "\n".join(lines)


def _some_noise(rng: random.Random, room: int, power: float) -> str:
    """Noise of at most ``room`` characters; the lower ``power``, the longer. The logarithm of its length is uniform at 1."""
    most = room // (max(map(len, NOISE)) + 1)
    return noise(int((most + 1) ** rng.random() ** power)) if most and rng.random() < 0.9 else ""


def is_passkey(name: str) -> bool:
    """Whether the input ``name`` asks for generated documents: ``passkey:DOCUMENTS:LONGEST``."""
    return name.startswith(PREFIX)


@functools.lru_cache(maxsize=4)
def passkey_bytes(name: str) -> bytes:
    """The documents that ``name`` asks for, separated by NUL. A name always gives the same documents. Raises UserError."""
    documents, longest = _numbers(name)
    rng = random.Random(name)
    return SEPARATOR.join(document(rng, longest) for _ in range(documents)).encode()


def _numbers(name: str) -> tuple[int, int]:
    parts = name.removeprefix(PREFIX).split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 12 for part in parts):
        raise UserError(
            f"input {name} is not of the form {PREFIX}DOCUMENTS:LONGEST: give the number of documents and the most "
            f"characters of one, as in {PREFIX}20000:3600"
        )
    documents, longest = map(int, parts)
    if documents < 1 or not _LEAST <= longest <= _MOST:
        raise UserError(
            f"input {name} asks for {counted(documents, 'document')} of at most {longest:,} characters: give at least "
            "one document, "
            f"and {_LEAST:,} to {_MOST:,} characters"
        )
    if documents * longest > _ALL:
        raise UserError(
            f"input {name} may become {documents * longest:,} characters, which are held in memory: ask for at most {_ALL:,}"
        )
    return documents, longest

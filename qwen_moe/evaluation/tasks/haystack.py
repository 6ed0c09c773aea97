"""The text in which answers are hidden: noise sentences, and running text for the tasks that RULER fills with essays."""

import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_moe.data.passkey import NOISE as SENTENCES
from qwen_moe.documents import read_text
from qwen_moe.errors import UserError

NOISE = " ".join(SENTENCES)
_RULE = re.compile(r"^[*=~+^#-]{3,}$")  # lines under headings
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Essay:
    """Running text as words. ``source`` says where it is from."""

    words: tuple[str, ...]
    source: str

    def text(self, count: int) -> str:
        """The first ``count`` words; from the beginning again where the essay ends."""
        repeats = -(-count // len(self.words))
        return " ".join((self.words * repeats)[:count])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()


def read_essay(path: Path | None) -> Essay:
    """The text of a file or, for None, the help topics of this Python, which every machine has. Raises UserError."""
    if path is None:
        text, source = _help_topics(), f"help topics of Python {platform.python_version()}"
    else:
        text, source = read_text(path, "--essay", "a text file"), path.name
    words = tuple(word for word in text.split() if not _RULE.match(word))
    if not words:
        raise UserError(f"--essay {path} holds no words: give a file of running text")
    return Essay(words, source)


def _help_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python comes without its help topics (pydoc_data): give a text with --essay FILE"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def sentences(text: str) -> list[str]:
    """Split after a full stop, an exclamation mark or a question mark and white space. Without text there are none."""
    return _BETWEEN_SENTENCES.split(text.strip()) if text.strip() else []

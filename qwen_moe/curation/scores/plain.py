"""Two scores that need no model: how much of a text is words, and how little it repeats itself."""

import re
import zlib
from typing import Any

_WORD = re.compile(r"[^\W\d_]{2,}")
_MOST = 1 << 16  # characters of a document that are compressed: zlib looks back only 32 KB anyway


def plain(text: str, metadata: dict[str, Any]) -> dict[str, float]:
    """``words``: the share of the characters, without white space, that are in words of two or more letters, from 0 to 1.
    Tables of numbers have little of it. ``variety``: the size of the text after zlib's compression, of the size before;
    running text has 0.3 to 0.5, and text that repeats itself less."""
    characters = sum(map(len, text.split()))
    words = sum(len(word) for word in _WORD.findall(text))
    content = text[:_MOST].encode("utf-8", errors="replace")
    # Short texts gain nothing from compression, and count as varied.
    variety = min(1.0, len(zlib.compress(content, 6)) / max(len(content), 1))
    return {"words": words / max(characters, 1), "variety": variety}

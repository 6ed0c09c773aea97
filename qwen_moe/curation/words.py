"""Words and sentences without a model: what the library's filters need where none of its word tokenizers can run."""

import re

from qwen_moe.curation.library import WordTokenizer, load_word_tokenizer
from qwen_moe.errors import UserError

# A word is a run of letters, digits and combining marks, joined by apostrophes and hyphens inside. Chinese and Japanese
# have no spaces between words: there each character is one. All other characters that are not white space stand alone.
_CHARACTERWISE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHARACTERWISE}]|[^\W{_CHARACTERWISE}]+(?:['’\-][^\W{_CHARACTERWISE}]+)*|\.\.\.|[^\w\s]")
# A sentence ends at its punctuation, with quotes and brackets that close, if white space follows, and at a line's end.
_END = re.compile(r"[.!?؟।]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*|\n+")


class SimpleWords(WordTokenizer):
    """Splits by regular expressions: the same for every language, without downloads. Two of them are equal."""

    def __init__(self) -> None:
        super().__init__("simple")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimpleWords)

    def __hash__(self) -> int:
        return hash("SimpleWords")

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[a:b].strip() for a, b in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(begin, end) of each sentence."""
        ends = [found.end() for found in _END.finditer(text)]
        spans = zip([0, *ends], [*ends, len(text)])
        return [(begin, end) for begin, end in spans if text[begin:end].strip()]


def word_tokenizer(name: str) -> WordTokenizer:
    """`simple`, or the library's own tokenizer of a language, such as `en`. Raises UserError if it cannot run here."""
    if name == "simple":
        return SimpleWords()
    try:
        found = load_word_tokenizer(name)
        found.word_tokenize("A test.")
    except (ImportError, LookupError, OSError, ValueError) as error:
        raise UserError(
            f"words = {name!r}: the library's word tokenizer of this language cannot run ({str(error).strip()[:200]}): "
            "install what it needs, or use words: simple, which needs nothing"
        ) from None
    return found

"""Documents as prompts of a model: the tokens before a document, those of the document, and those after it.

Each part is tokenized by itself. So a control token that a document spells, such as the end of a turn, stays text, and the
prompt around a document is always the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_moe.data.tokenizer import control_ids, load_tokenizer, vocabulary_size
from qwen_moe.errors import UserError
from qwen_moe.generation.open import Opened
from qwen_moe.generation.tokenizer import chat_text, tokenizer_folder

_PLACE = "\u27e6document\u27e7"
GAP = "\n[...]\n"
_LONGEST_TOKEN = 32  # characters; of longer documents the middle is not even made tokens of


@dataclass(frozen=True)
class Around:
    """The tokens before and after a document, and those of each possible answer."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after) + max(map(len, self.answers))


@dataclass(frozen=True)
class Shortened:
    """The tokens of a document, and how many of its characters were left out of the middle."""

    tokens: list[int]
    left_out: int = 0


class Prompts:
    """Makes prompts for the model that is ``opened``. ``document_tokens``: of a document, at most.

    Raises UserError if the tokenizer has tokens that the model does not know.
    """

    def __init__(self, opened: Opened, document_tokens: int) -> None:
        folder = tokenizer_folder(opened.weights.directory)
        self._hf, self._where, self._ends = opened.tokenizer, folder, opened.end_tokens
        self.chat = bool(opened.tokenizer.chat_template)
        self._plain = load_tokenizer(folder)
        size = vocabulary_size(self._plain)
        if size > opened.config.vocab_size:
            raise UserError(
                f"tokenizer {folder} has {size:,} tokens but the model's vocabulary has {opened.config.vocab_size:,}: it "
                "belongs to another model"
            )
        self._control = control_ids(self._plain)
        self._gap = self._plain.encode(GAP, add_special_tokens=False).ids
        self._most = document_tokens
        if document_tokens < len(self._gap) + 2:
            raise UserError(
                f"--document-tokens (document_tokens) is {document_tokens}: give at least {len(self._gap) + 2}"
            )

    def around(self, before: str, after: str, answers: Sequence[str], end: bool = False) -> Around:
        """What stands around every document. ``end``: the answers are told apart by what ends them, too, because one may
        be the beginning of another. Raises UserError if the tokenizer cannot write the answers."""
        if self.chat:
            message = [{"role": "user", "content": f"{before}{_PLACE}{after}"}]
            # Of models that can think first, the answer itself is asked for.
            whole = chat_text(self._hf, message, "the question", enable_thinking=False)
            if whole.count(_PLACE) != 1:
                raise UserError(f"the chat template of {self._where} does not write the user's message as it is")
            before, after = whole.split(_PLACE)
            first, last = self._tokens(before), self._tokens(after)
        else:
            first, last = self._hf(before, verbose=False)["input_ids"], self._tokens(after)
            answers = [f" {answer}" for answer in answers]
        found = [self._answer(after, last, answer) for answer in answers]
        if end:
            found = [(*tokens, *self._end(after, answer)) for tokens, answer in zip(found, answers, strict=True)]
        if len(set(found)) < len(found):
            raise UserError(
                f"tokenizer {self._where} writes two of the answers {', '.join(answers)} with the same tokens"
            )
        return Around(tuple(first), tuple(last), tuple(found))

    def documents(self, texts: Sequence[str]) -> list[Shortened]:
        """The tokens of documents. Of long ones, the middle is left out."""
        cut = [self._ends_of(text) for text in texts]
        encodings = self._plain.encode_batch([text for text, _ in cut], add_special_tokens=False)
        return [self._shortened(encoding, hidden) for encoding, (_, hidden) in zip(encodings, cut, strict=True)]

    def _ends_of(self, text: str) -> tuple[str, int]:
        half = self._most * _LONGEST_TOKEN
        return (text, 0) if len(text) <= 2 * half else (text[:half] + text[-half:], len(text) - 2 * half)

    def _shortened(self, encoding: Any, hidden: int) -> Shortened:
        # A tokenizer's model may have a control token as an ordinary word.
        kept = [
            (token, at) for token, at in zip(encoding.ids, encoding.offsets, strict=True) if token not in self._control
        ]
        ids, left_out = [token for token, _ in kept], hidden
        if len(kept) < len(encoding.ids):
            control = (at for token, at in zip(encoding.ids, encoding.offsets, strict=True) if token in self._control)
            left_out += sum(end - begin for begin, end in control)
        if len(ids) <= self._most and not hidden:
            return Shortened(ids, left_out)
        room = min(self._most, len(ids)) - len(self._gap)
        head, tail = room - room // 2, room // 2
        if tail < 1:  # fewer tokens than the gap has: all of them
            return Shortened(ids[: self._most], left_out)
        middle = max(0, kept[-tail][1][0] - kept[head - 1][1][1])
        return Shortened([*ids[:head], *self._gap, *ids[-tail:]], left_out + middle)

    def _tokens(self, text: str) -> list[int]:
        return self._hf(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _answer(self, after: str, last: list[int], answer: str) -> tuple[int, ...]:
        """The tokens of ``answer`` where it stands."""
        whole = self._tokens(after + answer)
        tokens = whole[len(last) :]
        if whole[: len(last)] != last or not tokens or self._hf.decode(tokens).strip() != answer.strip():
            raise UserError(
                f"the tokenizer in {self._where} cannot write the answer {answer.strip()!r} after the question (it becomes "
                f"{self._hf.convert_ids_to_tokens(tokens)}): give an instruct model whose tokenizer has these characters"
            )
        return tuple(tokens)

    def _end(self, after: str, answer: str) -> list[int]:
        """What ends an answer: the end of the turn or, without a chat template, of the line."""
        if self.chat and self._ends:
            return self._ends[:1]
        whole = self._tokens(after + answer)
        return self._tokens(f"{after}{answer}\n")[len(whole) :] or self._tokens("\n")

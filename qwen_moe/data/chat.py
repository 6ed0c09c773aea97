"""One conversation as tokens, by the tokenizer's own chat template, and which of its tokens are learned.

Tokens are those of transformers' `apply_chat_template`. Where the template marks what the assistant writes
(`{% generation %}`), its marks are taken. Where it does not, the conversation is rendered up to each assistant turn and
through it, and both must be beginnings of the whole: what is between them is the turn. In both cases the token that ends a
turn is learned, so that the model learns to stop.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_moe.data.conversations import BadRow, Conversation, Message, conversations
from qwen_moe.data.tokenizer import read_tokenizer
from qwen_moe.data.unknown import FIX, Unknown
from qwen_moe.errors import UserError

Learn = Literal["assistant", "last", "all"]
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
LEFT_OUT = "left out by the chat template"
_PROBE = "answer"  # what the assistant says when the template is tried out


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """``ids [n]`` int64, and ``learn [n]`` uint8: 1 for tokens that are learned. The first token never is, because nothing
    comes before it."""

    ids: np.ndarray
    learn: np.ndarray

    @property
    def learned(self) -> int:
        return int(self.learn.sum())

    def cut(self, length: int) -> "Encoded":
        """The first ``length`` tokens."""
        return Encoded(ids=self.ids[:length], learn=self.learn[:length])


class Chat:
    """A tokenizer's chat template. ``learn``: every turn of the assistant, its last turn, or all tokens.
    ``tokenizer``: that of ``directory``, where it is read already.

    Raises UserError if there is no template, or if it does not end what the assistant says with a special token.
    """

    def __init__(self, directory: Path, learn: Learn = "assistant", tokenizer: Any = None) -> None:
        self.directory, self.learn = directory, learn
        self.tokenizer = read_tokenizer(directory) if tokenizer is None else tokenizer
        if not self.tokenizer.chat_template:
            raise UserError(
                f"tokenizer {directory} has no chat template (in tokenizer_config.json or chat_template.jinja): add the "
                "template of the model"
            )
        if not self.tokenizer.is_fast:
            raise UserError(f"tokenizer {directory} has no tokenizer.json: convert it to a fast one with transformers")
        self._unknown = Unknown(self.tokenizer.backend_tokenizer)
        added = self.tokenizer.added_tokens_decoder
        self.special = {number for number, token in added.items() if token.special}
        texts = sorted({str(added[number]) for number in self.special if str(added[number]).strip()})
        self.control = re.compile("|".join(map(re.escape, texts))) if texts else None
        self.header, self.end = self._try_out()

    @property
    def template(self) -> Any:
        """The template, or several by name; it decides the tokens together with the tokenizer."""
        return self.tokenizer.chat_template

    def _try_out(self) -> tuple[str, int]:
        """What the template writes before an answer although it was told to begin one, and the token that ends an answer."""
        asked = [{"role": "user", "content": "question"}]
        answered = [*asked, {"role": "assistant", "content": _PROBE}]
        where = f"the chat template of tokenizer {self.directory}"
        try:
            before, whole = self._render(asked, None, begin=True), self._render(answered, None)
        except BadRow as error:
            raise UserError(f"{where} cannot write a question and its answer: {error}") from None
        if not whole.startswith(before) or _PROBE not in whole[len(before) :]:
            raise UserError(
                f"{where} writes an answer elsewhere than after {before!r}, where a model begins it: {whole!r}"
            )
        said = whole.rindex(_PROBE)
        # Templates that begin an answer by themselves have nothing left to write before it, or an empty thought.
        plain = self._render(asked, None)
        header = whole[len(before) : said] if plain == before else ""
        encoding = self._encode(whole)
        first = encoding.char_to_token(0, said + len(_PROBE) - 1)
        ends = [token for token in encoding["input_ids"][first + 1 :] if token in self.special]
        if not ends:
            raise UserError(
                f"{where} ends the assistant's turn without a special token ({whole[said:]!r} is its end), so a model could "
                "not learn to stop: let the template write one, such as eos_token"
            )
        return header, ends[0]

    def read(self, row: dict[str, Any]) -> tuple[Conversation, ...]:
        """The row's conversations (`conversations`), whose texts spell none of the tokenizer's special tokens."""
        return conversations(row, self.control)

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokens and what is learned of them. Raises BadRow if the template refuses the conversation, leaves some of it out,
        rewrites earlier turns, if the tokenizer has no tokens for some of it, or if nothing is learned."""
        messages, tools = conversation.messages, conversation.tools
        turns = conversation.answers
        if self.learn == "last":
            turns = turns[-1:]
        if self.learn == "all":
            whole = self._render(messages, tools)
            encoding = self._encode(whole)
            learn = np.ones(len(encoding["input_ids"]), np.uint8)
        elif _MARK.search(self.tokenizer.get_chat_template(tools=tools)):
            whole, encoding, learn = self._marked(messages, tools, turns)
        else:
            whole = self._render(messages, tools)
            encoding = self._encode(whole)
            learn = np.zeros(len(encoding["input_ids"]), np.uint8)
            for turn in turns:
                first, last = self._span(messages, tools, turn, whole, encoding)
                learn[first:last] = 1
        self._check_kept(messages, tools, whole)
        if problem := self._unknown.problem(whole, encoding["input_ids"]):
            raise BadRow("unknown to the tokenizer", f"the tokenizer {problem}: {FIX}")
        learn[:1] = 0
        if not learn.any():
            raise BadRow("nothing is learned", "the chat template gives no token that would be learned")
        return Encoded(ids=np.array(encoding["input_ids"], np.int64), learn=learn)

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, begin: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=begin
            )
        except Exception as error:  # a template raises what it likes
            raise BadRow("refused by the chat template", f"the chat template refuses it: {error}") from None
        return text

    def _check_kept(self, messages: list[Message], tools: list[Any] | None, whole: str) -> None:
        """Raise BadRow if the rendered text lacks a question, the tools or the tool calls."""
        for number, message in enumerate(messages, 1):
            if message["role"] in ("system", "user") and (text := (message.get("content") or "").strip()) not in whole:
                raise BadRow(LEFT_OUT, f"the chat template leaves out {text[:40]!r} of message {number}")
        without = [{"content": ""} | {k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
        if any(m.get("tool_calls") for m in messages) and self._writes(without, tools, whole):
            raise BadRow(LEFT_OUT, "the chat template leaves out tool calls: use a template that writes them")
        if tools and self._writes(messages, None, whole):
            raise BadRow(LEFT_OUT, "the chat template leaves out the tools: use a template that writes them")

    def _writes(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> bool:
        try:
            return self._render(messages, tools) == text
        except BadRow:
            return False

    def _encode(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)

    def _marked(
        self, messages: list[Message], tools: list[Any] | None, turns: list[int]
    ) -> tuple[str, Any, np.ndarray]:
        """The rendered text, its tokens, and of the template's own marks those from the first of ``turns`` on."""
        whole = self._render(messages, tools)
        try:
            encoding = self.tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # a template raises what it likes
            raise BadRow("refused by the chat template", f"the chat template refuses it: {error}") from None
        learn = np.array(encoding["assistant_masks"], np.uint8)
        ids, (starts, ends) = encoding["input_ids"], _offsets(encoding)
        for after in np.flatnonzero(learn[:-1] & ~learn[1:] & 1) + 1:
            # transformers takes only the first token of a character that consists of several.
            while after < len(ids) and starts[after] < ends[after - 1]:
                learn[after] = 1
                after += 1
            if after < len(ids) and ids[after] == self.end:
                learn[after] = 1
        if any(m["role"] == "assistant" and n < turns[0] for n, m in enumerate(messages)):
            before = self._render(messages[: turns[0]], tools, begin=True)
            _check_beginning(whole, before, turns[0], "what comes before")
            learn[: np.searchsorted(ends, len(before), "right")] = 0
        return whole, encoding, learn

    def _span(
        self, messages: list[Message], tools: list[Any] | None, turn: int, whole: str, encoding: Any
    ) -> tuple[int, int]:
        """The first token of an assistant's turn, and the one after the token that ends it, from the text alone."""
        before = self._render(messages[:turn], tools, begin=True) + self.header
        through = whole if turn == len(messages) - 1 else self._render(messages[: turn + 1], tools)
        _check_beginning(whole, before, turn, "what comes before")
        _check_beginning(whole, through, turn, "it")
        starts, ends = _offsets(encoding)
        first, after = np.searchsorted(ends, len(before), "right"), np.searchsorted(starts, len(through), "left")
        special = [n for n in range(first, after) if encoding["input_ids"][n] in self.special]
        if not special:
            raise BadRow("a turn without an end", f"the chat template ends message {turn + 1} without a special token")
        return int(first), special[-1] + 1


def _offsets(encoding: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins and ends in the text, in characters."""
    offsets = np.array(encoding[0].offsets, np.int64).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]


def _check_beginning(whole: str, beginning: str, turn: int, what: str) -> None:
    if not whole.startswith(beginning):
        raise BadRow(
            "earlier turns rewritten",
            f"the chat template writes {what} differently once messages follow message {turn + 1} (templates that drop "
            "thoughts do), so which tokens are that turn's is not known: use --learn last, a template with "
            "{% generation %}, or one row for each answer",
        )

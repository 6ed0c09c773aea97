"""Rows of chat data: conversations, prompts with completions, and pairs of answers. What is wrong with one is said here,
before anything is tokenized."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qwen_moe.errors import UserError

Kind = Literal["chat", "pairs"]
Message = dict[str, Any]

# The roles that may follow each role; None begins a conversation.
_FOLLOWING: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
PREFERENCE = "preference"  # the criterion of pairs that say only which answer was chosen
FORMS = "messages; prompt and completion; or prompt, chosen and rejected"


class BadRow(UserError):
    """A row that cannot be used. ``reason`` is the same for all rows with this mistake, for counting."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:  # it comes from other processes
        return BadRow, (self.reason, str(self))


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """``messages`` as the chat template gets them, and ``tools`` (JSON schemas). Only what messages from number ``first`` on
    say may be learned: in a row with a prompt, what follows it."""

    messages: list[Message]
    tools: list[Any] | None = None
    first: int = 0

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages that may be learned."""
        return [n for n, m in enumerate(self.messages) if m["role"] == "assistant" and n >= self.first]


def kind_of(row: dict[str, Any]) -> Kind:
    """``pairs`` for a row with chosen and rejected, otherwise ``chat``."""
    return "pairs" if "chosen" in row or "rejected" in row else "chat"


def preferences(row: dict[str, Any]) -> dict[str, int]:
    """Of a pair, by criterion: 1 if the chosen answer was judged the better one, -1 if the rejected one was. Raises BadRow.

    Row key ``preferences`` holds them; 0 stands for a criterion that was not judged. Without it, the chosen answer is the
    better one by `PREFERENCE`.
    """
    if row.get("preferences") is None:
        return {PREFERENCE: 1}
    given = row["preferences"]
    if not isinstance(given, dict):
        raise BadRow(
            "bad preferences", f"preferences is {_shown(given)}, expected an object of criteria with 1, -1 or 0"
        )
    for name, value in given.items():
        if type(value) is not int or value not in (-1, 0, 1):
            what = (
                f"preferences: {_shown(name)} is {_shown(value)}, expected 1 (chosen is better), -1 (rejected is) or 0"
            )
            raise BadRow("bad preferences", what)
        if not name.isprintable() or name != name.strip() or not 0 < len(name) <= 60:
            what = f"preferences: {_shown(name)} is not the name of a criterion; give up to 60 characters on one line"
            raise BadRow("bad preferences", what)
    return {name: value for name, value in given.items() if value}


def conversations(row: dict[str, Any], control: re.Pattern[str] | None = None) -> tuple[Conversation, ...]:
    """The conversation of a row or, of a pair, those with the chosen and the rejected answer. Raises BadRow.

    ``control``: what no message may contain, because the tokenizer would read it as one of its special tokens. A pair is a
    row with ``chosen`` and ``rejected``; of the other rows ``messages`` counts before ``prompt`` and ``completion``; other
    keys are not read here (`preferences` reads one). A prompt of text is a user's message, a completion of text the
    assistant's.
    """
    _check_text(row, control)
    tools = tools_of(row)
    if kind_of(row) == "pairs":
        _need(row, ("prompt", "chosen", "rejected"))
        pair = tuple(_answered(row["prompt"], row[name], name, tools) for name in ("chosen", "rejected"))
        if pair[0].messages == pair[1].messages:
            raise BadRow("chosen equal to rejected", "chosen and rejected are equal: nothing can be preferred")
        return pair
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        _check_order(messages)
        if all(message["role"] != "assistant" for message in messages):
            raise BadRow("no assistant turn", "no message is the assistant's, so there is nothing to learn")
        return (Conversation(messages=messages, tools=tools),)
    _need(row, ("prompt", "completion"))
    return (_answered(row["prompt"], row["completion"], "completion", tools),)


def _need(row: dict[str, Any], keys: tuple[str, ...]) -> None:
    if missing := [key for key in keys if key not in row]:
        found = ", ".join(list(row)[:20]) or "nothing"
        raise BadRow("lacking keys", f"there is no {' and no '.join(missing)} (found: {found}); a row has {FORMS}")


def _answered(prompt: Any, answer: Any, name: str, tools: list[Any] | None) -> Conversation:
    """The conversation of a prompt and an answer. An answer that repeats the prompt's messages is taken without them."""
    asked = _messages(prompt, "prompt", "user")
    given = _messages(answer, name, "assistant", {})
    if not given:
        raise BadRow("empty completion", f"{name} is an empty list, expected the assistant's message")
    if given[: len(asked)] == asked:
        given = given[len(asked) :]
    if not given or given[0]["role"] != "assistant":
        begins = f"begins with a message of {given[0]['role']!r}" if given else "repeats the prompt and says no more"
        raise BadRow("roles out of order", f"{name} {begins}; expected the assistant's answer to the prompt")
    _check_order(asked + given, len(asked), name)
    return Conversation(messages=asked + given, tools=tools, first=len(asked))


def _messages(value: Any, name: str, role: str = "", empty: Any = None) -> list[Message]:
    """The messages under key ``name``; a text is one message of ``role``."""
    if isinstance(value, str) and role:
        value = [{"role": role, "content": value}]
    if isinstance(value, dict) and role:
        value = [value]
    if not isinstance(value, list) or (not value and empty is None):
        form = 'a list of messages like {"role": "user", "content": "..."}' + (", or text" if role else "")
        raise BadRow("no messages", f"{name} is {_shown(value)}, expected {form}")
    for number, message in enumerate(value, 1):
        _check_message(message, f"{name}, message {number}")
    return value


def _check_message(message: Any, where: str) -> None:
    """Raise BadRow unless it is a message with a known role and text, or tool calls of the assistant."""
    if not isinstance(message, dict):
        raise BadRow("no messages", f"{where} is {_shown(message)}, expected an object with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in _FOLLOWING:
        raise BadRow("unknown role", f"{where} has role {_shown(role)}, expected system, user, assistant or tool")
    if calls and role != "assistant":
        raise BadRow("roles out of order", f"{where} is {role!r} and has tool_calls; only the assistant calls tools")
    if calls is not None and not isinstance(calls, list):
        raise BadRow("bad tool call", f"{where}: tool_calls is {_shown(calls)}, expected a list")
    for call in calls or []:
        if not tool_name(call):
            raise BadRow("bad tool call", f"{where}: {_shown(call)} is no tool call; expected a name and arguments")
    if content is not None and not isinstance(content, str):
        hint = " (join the text of its parts)" if isinstance(content, list) else ""
        raise BadRow("no text", f"{where}: content is {_shown(content)}, expected text{hint}")
    if content is None and not calls:
        raise BadRow("no text", f"{where} has no content")
    if role == "assistant" and not calls and not (content or "").strip():
        raise BadRow("empty completion", f"{where}: the assistant says nothing, so there is nothing to learn")


def tool_name(call: Any) -> str:
    """The name of the function of a tool or tool call; empty if it is none."""
    if not isinstance(call, dict):
        return ""
    inner = call.get("function", call)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """The tools (JSON schemas) of a row; None if it has none. Raises BadRow."""
    tools = row.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(tool_name(tool) for tool in tools):
        raise BadRow("bad tools", f"tools is {_shown(tools)}, expected a list of JSON schemas of functions with names")
    return tools


def _check_order(messages: list[Message], first: int = 0, name: str = "messages") -> None:
    """Raise BadRow unless user and assistant take turns, after at most one system message; tools answer the assistant."""
    before: str | None = None
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in _FOLLOWING[before]:
            where = f"{name}, message {number - first + 1}" if number >= first else f"prompt, message {number + 1}"
            follows = f"follows {before!r}" if before else "is the first"
            expected = " or ".join(_FOLLOWING[before])
            raise BadRow("roles out of order", f"{where}: {role!r} {follows}; expected {expected}")
        before = role


def _check_text(row: Any, control: re.Pattern[str] | None) -> None:
    for text in _texts(row):
        if "\0" in text:
            raise BadRow("not Unicode", "the text has a NUL (\\u0000), which no text has; correct the text")
        if not text.isascii() and (half := _SURROGATE.search(text)):
            what = f"\\u{ord(half[0]):04x} is half of a surrogate pair, which is not a character; correct the text"
            raise BadRow("not Unicode", what)
        if control is not None and (found := control.search(text)):
            what = f"the text contains {found[0]!r}, which the tokenizer reads as a special token; remove or reword it"
            raise BadRow("special token in text", what)


def _texts(value: Any) -> Iterator[str]:
    """Every text of the row that a template may write."""
    stack = [{k: v for k, v in value.items() if k in _READ}] if isinstance(value, dict) else []
    while stack:
        inner: Any = stack.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            stack += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list):
            stack += inner


_READ = ("messages", "prompt", "completion", "chosen", "rejected", "tools")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

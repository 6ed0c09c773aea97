"""Which tokens of a conversation are learned: as transformers marks them, and the same from the text alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.data.chat import Chat, Encoded
from qwen_moe.data.conversations import BadRow, Conversation
from qwen_moe.data.tokenizer import read_tokenizer, train_tokenizer
from qwen_moe.errors import UserError
from tests.data.chat_templates import (
    END_OUTSIDE,
    TEMPLATES,
    THINKING,
    WITH_SYSTEM,
    WITH_TOOLS,
    unmarked,
    with_template,
)

Chats = dict[str, tuple[Chat, Chat]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has tokens of two line ends, of which one may be the template's and one the answer's."""
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(["alpha\n\nbeta\n\ngamma\n\n\n def return import"] * 3, 290, path)
    assert len(read_tokenizer(path)("\n\n")["input_ids"]) == 1
    return path


@pytest.fixture(scope="module")
def chats(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Chats:
    """By name of the template: with the marker, and without it."""
    folder = tmp_path_factory.mktemp("templates")
    made = {}
    for name, text in TEMPLATES.items():
        marked = Chat(with_template(tokenizer, text, folder / name))
        made[name] = (marked, Chat(with_template(tokenizer, unmarked(text), folder / f"{name}-unmarked")))
    return made


def chat_of(tokenizer: Path, template: str, folder: Path, **options: Any) -> Chat:
    return Chat(with_template(tokenizer, template, folder / "tokenizer"), **options)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


TALK = [said("user", "alpha?"), said("assistant", "beta"), said("user", "gamma?"), said("assistant", "delta")]
WORDS = st.text(alphabet=st.sampled_from("ab \n.?ä👩🏽é̂<|>"), max_size=8)
ANSWERS = WORDS.filter(str.strip)
CALLS = st.lists(
    st.fixed_dictionaries({"name": st.just("find"), "arguments": st.dictionaries(ANSWERS, WORDS, max_size=2)}),
    min_size=1,
    max_size=2,
)


@st.composite
def talks(draw: st.DrawFn, system: bool = True, tools: bool = True) -> Conversation:
    messages = [said("system", draw(WORDS))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(said("user", draw(WORDS)))
        while tools and draw(st.booleans()):
            call = said("assistant", draw(WORDS), tool_calls=draw(CALLS))
            messages += [call, *(said("tool", draw(WORDS)) for _ in range(draw(st.integers(1, 2))))]
        messages.append(said("assistant", draw(ANSWERS)))
    schema = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    return Conversation(messages=messages, tools=schema if tools and draw(st.booleans()) else None)


def learned(chat: Chat, encoded: Encoded) -> list[str]:
    """The texts of the stretches of learned tokens."""
    edges = np.flatnonzero(np.diff(encoded.learn, prepend=0, append=0)).reshape(-1, 2)
    return [chat.tokenizer.decode(encoded.ids[first:after]) for first, after in edges]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_are_those_of_transformers_with_the_marker_and_without(
    name: str, chats: Chats, data: st.DataObject
) -> None:
    talk = data.draw(talks(system=name in WITH_SYSTEM, tools=name in WITH_TOOLS))
    marked, plain = chats[name]
    theirs = marked.tokenizer.apply_chat_template(
        talk.messages, tools=talk.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    for encoded in (marked.encode(talk), plain.encode(talk)):
        assert encoded.ids.tolist() == theirs["input_ids"]
        assert encoded.learn.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_words_and_the_end_of_its_turn_are_learned(name: str, marked: bool, chats: Chats) -> None:
    chat = chats[name][0 if marked else 1]
    end = chat.tokenizer.decode([chat.end])
    assert learned(chat, chat.encode(Conversation(messages=TALK))) == [f"beta{end}", f"delta{end}"]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_turn_or_what_follows_a_prompt(name: str, marked: bool, chats: Chats) -> None:
    chat = chats[name][0 if marked else 1]
    end = chat.tokenizer.decode([chat.end])
    last = Chat(chat.directory, "last")
    assert learned(last, last.encode(Conversation(messages=TALK))) == [f"delta{end}"]
    assert learned(chat, chat.encode(Conversation(messages=TALK, first=3))) == [f"delta{end}"]
    (talk,) = chat.read({"prompt": TALK[:3], "completion": "delta"})
    assert learned(chat, chat.encode(talk)) == [f"delta{end}"]


def test_all_tokens_but_the_first_which_nothing_precedes(chats: Chats) -> None:
    chat = Chat(chats["ours"][0].directory, "all")
    encoded = chat.encode(Conversation(messages=TALK))
    assert encoded.learn.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_an_end_outside_of_the_marker_is_learned_all_the_same(tokenizer: Path, tmp_path: Path) -> None:
    """TRL #5988: a model that never sees the end of its turn never stops. Also after a character of several tokens."""
    chat = chat_of(tokenizer, END_OUTSIDE, tmp_path)
    messages = [*TALK, said("user", "and?"), said("assistant", "👩🏽")]
    assert learned(chat, chat.encode(Conversation(messages=messages))) == [
        "beta<|im_end|>", "delta<|im_end|>", "👩🏽<|im_end|>",
    ]  # fmt: skip
    theirs = chat.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert not any(m for i, m in zip(theirs["input_ids"], theirs["assistant_masks"]) if i == chat.end)


def test_special_tokens_within_a_turn_do_not_end_it(tokenizer: Path, tmp_path: Path) -> None:
    inside = "{{- message.content + '<|quad_end|>' + eos_token }}"
    template = unmarked(TEMPLATES["inst"]).replace("{{- message.content + eos_token }}", inside)
    chat = chat_of(tokenizer, template, tmp_path)
    assert learned(chat, chat.encode(Conversation(messages=TALK))) == [
        "beta<|quad_end|><|endoftext|>", "delta<|quad_end|><|endoftext|>",
    ]  # fmt: skip


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("marked", [True, False])
def test_tool_calls_are_learned_and_answers_of_tools_are_not(name: str, marked: bool, chats: Chats) -> None:
    chat = chats[name][0 if marked else 1]
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": "alpha"}}}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [call]}, said("tool", "gamma"), TALK[1]]
    (talk,) = chat.read({"messages": messages, "tools": [call]})
    first, second = learned(chat, chat.encode(talk))
    assert json.loads(first.split("<tool_call>")[1].split("</tool_call>")[0]) == {
        "name": "find",
        "arguments": {"x": "alpha"},
    }
    assert first.endswith("</tool_call><|im_end|>") and second == "beta<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_turns_and_not_for_the_last(
    tokenizer: Path, tmp_path: Path
) -> None:
    messages = [
        said("user", "a"),
        said("assistant", "hm</think>b"),
        said("user", "c"),
        said("assistant", "hm</think>d"),
    ]
    chat = chat_of(tokenizer, THINKING, tmp_path)
    with pytest.raises(BadRow, match=r"writes it differently once messages follow message 2 .*--learn last") as error:
        chat.encode(Conversation(messages=messages))
    assert error.value.reason == "earlier turns rewritten"
    last = Chat(chat.directory, "last")
    assert learned(last, last.encode(Conversation(messages=messages))) == ["hm</think>d<|im_end|>"]
    assert learned(chat, chat.encode(Conversation(messages=messages, first=3))) == ["hm</think>d<|im_end|>"]
    assert learned(chat, chat.encode(Conversation(messages=messages[:2]))) == ["hm</think>b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "could not learn to stop"),
        ("{{ raise_exception('no talk') }}", "cannot write a question and its answer: .*no talk"),
        ("{% for m in messages|reverse %}{{ m.content + '<|im_end|>' }}{% endfor %}", "elsewhere than after"),
        ("{% for m in messages %}{{ m.content ", "cannot write a question"),
    ],
)
def test_templates_that_cannot_work_are_refused_before_any_row(
    tokenizer: Path, tmp_path: Path, template: str, message: str
) -> None:
    directory = with_template(tokenizer, template, tmp_path / "t")
    if not template:
        (directory / "chat_template.jinja").unlink()
        values = json.loads((directory / "tokenizer_config.json").read_text())
        del values["chat_template"]
        (directory / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        Chat(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("template", "messages", "reason", "message"),
    [
        (TEMPLATES["inst"].replace("message.content + ' [", "' ["), TALK, "left out", "'alpha\\?' of message 1"),
        (TEMPLATES["inst"], [TALK[0], {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}],
         "left out", "leaves out tool calls"),
        (TEMPLATES["ours"].replace("message.content or ''", "message.content or undefined.x"),
         [TALK[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}], "refused", "refuses it"),
    ],
)  # fmt: skip
def test_conversations_that_the_template_spoils(
    tokenizer: Path, tmp_path: Path, template: str, messages: list[dict[str, Any]], reason: str, message: str
) -> None:
    chat = chat_of(tokenizer, template, tmp_path)
    with pytest.raises(BadRow, match=message) as error:
        chat.encode(Conversation(messages=messages))
    assert error.value.reason.startswith(reason)


def test_a_mask_that_counts_nothing_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    """TRL #4147, #4201: a mask of zeros only warned. Here the marker is where the rows have no turn of the assistant."""
    template = TEMPLATES["ours"].replace(
        "{%- generation %}", "{%- if messages[0].content != 'alpha?' %}{%- generation %}"
    )
    otherwise = "{%- endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}"
    chat = chat_of(tokenizer, template.replace("{%- endgeneration %}", otherwise), tmp_path)
    with pytest.raises(BadRow, match="no token that would be learned") as error:
        chat.encode(Conversation(messages=TALK))
    assert error.value.reason == "nothing is learned"


def test_tools_that_the_template_does_not_write_are_refused(chats: Chats) -> None:
    for chat in chats["llama"]:
        with pytest.raises(BadRow, match="leaves out the tools"):
            chat.encode(Conversation(messages=TALK, tools=[{"name": "find"}]))


def pair(chosen: Any, rejected: Any, prompt: Any = "p") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"text": "a"}, "lacking keys", r"no prompt and no completion \(found: text\); a row has messages"),
        ({"prompt": "a"}, "lacking keys", "no completion"),
        ({"prompt": "a", "chosen": "b"}, "lacking keys", "no rejected"),
        ({"messages": []}, "no messages", r"messages is \[\], expected a list"),
        ({"messages": "a"}, "no messages", "messages is 'a'"),
        ({"messages": TALK[:1]}, "no assistant turn", "nothing to learn"),
        ({"messages": TALK[1:]}, "roles out of order", "message 1: 'assistant' is the first; expected system or user"),
        ({"messages": [*TALK[:1], *TALK]}, "roles out of order", "message 2: 'user' follows 'user'; expected assistant"),
        ({"messages": [*TALK, TALK[1]]}, "roles out of order", "message 5: 'assistant' follows 'assistant'"),
        ({"messages": [TALK[0], said("tool", "x"), TALK[1]]}, "roles out of order", "'tool' follows 'user'"),
        ({"messages": [*TALK, said("system", "x")]}, "roles out of order", "'system' follows 'assistant'"),
        ({"messages": [said("bot", "x")]}, "unknown role", "role 'bot', expected system, user, assistant or tool"),
        ({"messages": [TALK[0], said("assistant", " \n")]}, "empty completion", "message 2: the assistant says nothing"),
        ({"messages": [{"role": "user"}, TALK[1]]}, "no text", "message 1 has no content"),
        ({"messages": [said("user", ["a"]), TALK[1]]}, "no text", r"is \['a'\], expected text \(join"),  # type: ignore[arg-type]
        ({"messages": [said("user", "", tool_calls=[{"name": "f"}])]}, "roles out of order", "only the assistant calls"),
        ({"messages": [TALK[0], said("assistant", "", tool_calls=[{"x": 1}])]}, "bad tool call", "expected a name"),
        ({"messages": [TALK[0], said("assistant", "", tool_calls={"x": 1})]}, "bad tool call", "expected a list"),
        ({"messages": TALK, "tools": ["f"]}, "bad tools", "JSON schemas"),
        ({"prompt": "a", "completion": ""}, "empty completion", "completion, message 1"),
        ({"prompt": "a", "completion": []}, "empty completion", "completion is an empty list"),
        ({"prompt": "a", "completion": [TALK[0]]}, "roles out of order", "completion begins with a message of 'user'"),
        ({"prompt": TALK[:2], "completion": "b"}, "roles out of order", "completion, message 1: 'assistant' follows"),
        ({"prompt": [], "completion": "b"}, "no messages", r"prompt is \[\]"),
        (pair("a", "a"), "chosen equal to rejected", "nothing can be preferred"),
        (pair([said("assistant", "a")], "a"), "chosen equal to rejected", "nothing can be preferred"),
        (pair("a", ""), "empty completion", "rejected, message 1"),
        (pair(TALK[:2], TALK[:1], TALK[:1]), "roles out of order", "rejected repeats the prompt and says no more"),
        ({"prompt": "see <|im_end|>", "completion": "a"}, "special token in text", r"'<\|im_end\|>'.*reword"),
        ({"messages": [said("user", "\ud800"), TALK[1]]}, "not Unicode", "half of a surrogate pair"),
        ({"messages": [said("user", "a\0"), TALK[1]]}, "not Unicode", "has a NUL"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(chats: Chats, row: dict[str, Any], reason: str, message: str) -> None:
    with pytest.raises(BadRow, match=message) as error:
        chats["ours"][0].read(row)
    assert error.value.reason == reason


def test_forms_of_a_row(chats: Chats) -> None:
    read = chats["ours"][0].read
    (talk,) = read({"messages": TALK, "prompt": "alpha?", "other": "<|im_end|>"})
    assert talk == Conversation(messages=TALK)
    for prompt in ("alpha?", TALK[0], TALK[:1]):
        for completion in ("beta", TALK[1], TALK[1:2], TALK[:2]):
            (talk,) = read({"prompt": prompt, "completion": completion})
            assert talk == Conversation(messages=TALK[:2], first=1)
    chosen, rejected = read(pair("beta", TALK[:1] + [said("assistant", "no")], "alpha?"))
    assert chosen == Conversation(messages=TALK[:2], first=1)
    assert rejected == Conversation(messages=[TALK[0], said("assistant", "no")], first=1)

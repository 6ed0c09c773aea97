"""Files of queries: what their prompts are, and that every mistake is counted and named."""

from pathlib import Path
from typing import Any

import pytest

from qwen_moe.errors import UserError
from qwen_moe.rollout.queries import Query, digest, read_queries
from qwen_moe.rollout.summary import asked
from tests.rollout.conftest import tokenizer, write_lines

LINES: list[Any] = [
    {"prompt": "abc", "answer": "x", "id": "first"},
    {"messages": [{"role": "user", "content": "hi"}], "tests": ["assert 1"]},
    "",
    {"tokens": [2, 1], "id": 12},
]


def test_prompts_of_each_form(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", LINES)
    queries = read_queries(path, tokenizer())
    assert [(q.number, q.id) for q in queries] == [(0, "first"), (1, "1"), (2, "12")]
    assert [q.prompt for q in queries] == ["abc", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "cb"]
    assert queries[0].values == LINES[0] and queries[2].tokens == [2, 1]
    chat = read_queries(path, tokenizer(), chat=True)
    assert chat[0].prompt == "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n"
    assert chat[1:] == queries[1:]
    assert digest(queries) == digest(read_queries(path, tokenizer())) != digest(chat)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
ASKED = [{"role": "user", "content": "sum"}, CALL, {"role": "tool", "content": "3"}]


def test_tools_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    """A model that was fine-tuned with tools would otherwise be asked without them."""
    lines = [{"messages": ASKED, "tools": TOOLS}, {"messages": ASKED, "tools": []}, {"prompt": "sum", "tools": TOOLS}]
    queries = read_queries(write_lines(tmp_path / "q.jsonl", lines), tokenizer(), chat=True)
    for query, messages, tools in zip(queries, (ASKED, ASKED, ASKED[:1]), (TOOLS, None, TOOLS), strict=True):
        expected = tokenizer().apply_chat_template(messages, tools=tools, add_generation_prompt=True)
        assert query.tokens == expected["input_ids"]
    wrote = ["may call one or more functions" in query.prompt for query in queries]  # its tokens are few characters
    assert wrote == [True, False, True]
    assert asked(queries[0].values) != asked(queries[1].values)
    plain = tokenizer()
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for wrong, message, reader in (
        ({"messages": ASKED[:1], "tools": "add"}, "line 1: tools is 'add', expected a list", tokenizer()),
        ({"messages": [{"role": "user", "content": None}]}, "line 1: messages must be a list", tokenizer()),
        (lines[2], "the chat template leaves out the tools", plain),
    ):
        with pytest.raises(UserError, match=message):
            read_queries(write_lines(tmp_path / "wrong.jsonl", [wrong]), reader, chat=True)


def test_mistakes_are_counted_and_named_together(tmp_path: Path) -> None:
    lines = ["not JSON", {"prompt": "a", "id": "1"}, {"prompt": "b", "tokens": [1]}, {"prompt": "c", "id": "1"}]
    lines += [{"prompt": "d", "id": True}, {"prompt": "eee"}, {"messages": []}, {"tokens": [-1]}]
    path = write_lines(tmp_path / "q.jsonl", lines)

    def short(query: Query) -> None:
        if len(query.tokens) > 2:
            raise UserError("it has more than 2 tokens")

    with pytest.raises(UserError) as error:
        read_queries(path, tokenizer(), checks=[short])
    text = str(error.value)
    assert text.startswith("7 of 8 queries cannot be used: ") and "; and 2 more. Correct" in text
    for part in (
        f"{path}, line 1 is not valid JSON", f"{path}, line 3 has prompt and tokens",
        'line 4: id "1" is also that of line 2',
        "line 5: id is True", f"{path}, line 6: it has more than 2 tokens",
    ):  # fmt: skip
        assert part in text
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for wrong, message in (
        ({"tokens": [-1]}, "not ids of the tokenizer"),
        ({"messages": []}, "must be a list"),
        (answered, "the last message is the assistant's"),
    ):
        with pytest.raises(UserError, match=message):
            read_queries(write_lines(tmp_path / "one.jsonl", [wrong]), tokenizer())
    with pytest.raises(UserError, match="has no queries"):
        read_queries(write_lines(tmp_path / "none.jsonl", [""]), tokenizer())
    with pytest.raises(UserError, match="cannot be read"):
        read_queries(tmp_path / "missing.jsonl", tokenizer())

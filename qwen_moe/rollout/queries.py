"""Files of queries: JSON lines with a prompt and whatever its reward needs. All mistakes are reported together, before work
starts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.counted import counted
from qwen_moe.errors import UserError
from qwen_moe.generation.prompts import PromptRow, prompt_lines, prompt_row
from qwen_moe.generation.prompts import digest as rows_digest

_SHOWN = 5  # mistakes that a message quotes


@dataclass(frozen=True, kw_only=True)
class Query:
    """A line of a file of queries.

    ``number``: its place among the queries of the file, from 0; with the seed it decides what is sampled. ``id``: the
    line's "id" as text or, without one, its number. ``values``: the line's object. ``tokens``: the prompt as the model
    reads it. ``prompt``: those tokens as text, control tokens included.
    """

    number: int
    id: str
    values: dict[str, Any]
    tokens: list[int]
    prompt: str


Check = Callable[[Query], None]


def read_queries(path: Path, tokenizer: Any, *, chat: bool = False, checks: Sequence[Check] = ()) -> list[Query]:
    """The queries of a JSONL file. Each line is an object with "prompt" (text), "messages" (a conversation) or "tokens"
    (ids), and any further values, such as "answer" or "tests".

    The tokenizer's chat template is applied to messages and, with ``chat``, to a prompt, which is then the user's message.
    ``checks`` raise UserError for a query that cannot be used, such as one that is too long or lacks what a reward needs.
    Raises one UserError that counts all mistakes and names the first with file and line.
    """
    lines = prompt_lines(path)
    queries: list[Query] = []
    mistakes: list[str] = []
    used: dict[str, str] = {}
    for number, (where, line) in enumerate(lines):
        try:
            query = _query(number, prompt_row(where, line, tokenizer, chat), tokenizer, where)
            note_id(used, query.id, path, where)
            _apply(checks, query, where)
            queries.append(query)
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        more = f"; and {len(mistakes) - _SHOWN:,} more" if len(mistakes) > _SHOWN else ""
        raise UserError(
            f"{len(mistakes):,} of {counted(len(lines), 'query')} cannot be used: "
            f"{'; '.join(mistakes[:_SHOWN])}{more}. Correct "
            "these lines, or remove them"
        )
    if not queries:
        raise UserError(f'{path} has no queries: give JSON lines with "prompt", "messages" or "tokens"')
    return queries


def id_of(values: Mapping[str, Any], number: int, where: str) -> str:
    """The id of the line ``number``. Raises UserError."""
    given = values.get("id", number)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise UserError(f"{where}: id is {given!r:.60}, expected text or a whole number")
    return str(given)


def note_id(used: dict[str, str], name: str, path: Path, where: str) -> None:
    """Add an id to those that are ``used``, each with its line. Raises UserError if it is there."""
    if name in used:
        raise UserError(f'{where}: id "{name}" is also that of {used[name]}: give each query its own')
    used[name] = where.removeprefix(f"{path}, ")


def _query(number: int, row: PromptRow, tokenizer: Any, where: str) -> Query:
    name = id_of(row.values, number, where)
    try:
        prompt = tokenizer.decode(row.tokens)
    except (OverflowError, TypeError):
        raise UserError(f"{where}: tokens are not ids of the tokenizer") from None
    return Query(number=number, id=name, values=row.values, tokens=row.tokens, prompt=prompt)


def _apply(checks: Sequence[Check], query: Query, where: str) -> None:
    for check in checks:
        try:
            check(query)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def digest(queries: Iterable[Query]) -> str:
    """A hash of the queries' values and tokens, which tells whether a file has changed."""
    return rows_digest(PromptRow(query.values, query.tokens) for query in queries)

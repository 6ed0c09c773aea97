"""The report of leaks: `leaks.html`, which needs no other file, and `leaks.json` with the same figures."""

import heapq
import html
import json
from pathlib import Path
from typing import Any

from launchers.counted import counted, tallied
from launchers.folder.atomic import write_json, write_text
from qwen_moe.curation.leaks.settings import MOST_CHANGED
from qwen_moe.data.sources import DROPPED
from qwen_moe.errors import UserError

_SHOWN = 20  # leaks of each test file
_LONGEST = 4_000  # characters of a passage
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc; padding: .3em .7em; text-align: left }
td.n { text-align: right } mark { background: #ffe08a; color: inherit } .leak { border-top: 1px solid #ccc; padding: .5em 0 }
.leak p { margin: .3em 0; overflow-wrap: anywhere } .what { color: #666; font-size: 13px }
"""


def json_path(report: Path) -> Path:
    """Where the figures of a page go."""
    return report.with_suffix(".json")


def check_report(report: Path) -> None:
    """Raises UserError for a path that cannot be a page."""
    if report.suffix != ".html":
        raise UserError(f"--report {report}: expected a name that ends in .html (the figures go beside it, in .json)")
    if report.is_dir():
        raise UserError(f"--report {report} is a folder: give the name of a page, such as {report}/leaks.html")


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What `leaks.json` says: the rule, counts, and for each test file its sequences and leaks."""
    names = ("rule", "least_tokens", "least_share", "tokens", "index", "counts", "bad")
    tests = record["tests"]
    return {name: record[name] for name in names} | {"tests": tests["files"], "short_tests": tests["short"]}


def write_report(report: Path, output: Path, record: dict[str, Any]) -> None:
    """Write the page and the figures of a finished output, both atomically."""
    found = figures(record)
    write_json(json_path(report), found)
    write_text(report, _page(found, _examples(output, record)))


def cost(found: dict[str, Any]) -> str:
    """What the literal rule costs, in a sentence; empty for the windowed rule."""
    if found["rule"] != "report":
        return ""
    counts = found["counts"]
    return (
        "The literal rule removes long documents by chance, because a long text has most words of a test somewhere, in "
        f"order: of {counted(counts['dropped'], 'dropped document')}, {counts['by_chance']:,} have no window of twice "
        "a test's length that matches (rule windowed keeps them)."
    )


def _examples(output: Path, record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Of each test file, the leaks with the smallest shares: those most likely to be none."""
    kept: dict[str, list[tuple[float, int, dict[str, Any]]]] = {}
    number = 0
    for name in record["files"]:
        if not name.startswith(f"{DROPPED}/"):
            continue
        with (output / name).open(encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                leak = json.loads(line)["metadata"]["leak"]
                heap = kept.setdefault(leak["test_file"], [])
                number += 1
                entry = (-leak["share"], -number, leak)
                if len(heap) < _SHOWN:
                    heapq.heappush(heap, entry)
                else:
                    heapq.heappushpop(heap, entry)
    return {name: [leak for _, _, leak in sorted(heap, reverse=True)] for name, heap in kept.items()}


def _rule(name: str) -> str:
    more = f", with at most one word in {MOST_CHANGED} of the shorter one replaced, put in or left out"
    return f"{name}{more if name == 'close' else ''}"


def _page(found: dict[str, Any], examples: dict[str, list[dict[str, Any]]]) -> str:
    counts = found["counts"]
    share = counts["dropped"] / counts["rows"] if counts["rows"] else 0.0
    lines = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>Leaks of tests</title><style>{_STYLE}</style>',
        "<h1>Leaks of tests</h1>",
        f"<p>{counts['dropped']:,} of {counted(counts['rows'], 'document')} ({share:.2%}) were dropped. A document is "
        "dropped if its "
        f"longest common subsequence with a test has at least {found['least_tokens']} tokens ({_text(found['tokens'])}) and "
        f"at least {found['least_share']:g} of the shorter of the two. Rule: {_rule(found['rule'])}; index: "
        f"{found['index']}.</p>",
    ]
    if said := cost(found):
        lines.append(f"<p><b>{_text(said)}</b></p>")
    if counts["bad"]:
        lines.append(
            f"<p>{counted(counts['bad'], 'row was', 'rows were')} left out: {_text('; '.join(found['bad']))}.</p>"
        )
    if found["short_tests"]:
        short = "; ".join(tallied(count, reason) for reason, count in found["short_tests"].items())
        lines.append(f"<p>Not checked: {_text(short)}.</p>")
    lines.append("<table><tr><th>tests<th>sequences<th>of these, found in the documents<th>documents dropped</tr>")
    for name, one in found["tests"].items():
        cells = "".join(f'<td class="n">{one[key]:,}' for key in ("sequences", "leaked_sequences", "documents"))
        lines.append(f"<tr><td>{_text(name)}{cells}</tr>")
    lines.append(
        "</table><p>A document is counted for the test that it has most in common with. Below are up to "
        f"{_SHOWN} documents for each file of tests, those with the smallest share first. The text is normalized, and "
        "marked where document and test agree.</p>"
    )
    for name, leaks in examples.items():
        lines.append(f"<h2>{_text(name)}</h2>")
        lines += [_example(leak) for leak in leaks]
    return "\n".join(lines) + "\n</html>\n"


def _example(leak: dict[str, Any]) -> str:
    document = leak["file"] + (f", line {leak['line']}" if leak["line"] else "")
    test = leak["test_file"] + (f", line {leak['test_line']}" if leak["test_line"] else "")
    others = f", and {counted(leak['other_tests'], 'other test')}" if leak["other_tests"] else ""
    return (
        f'<div class="leak"><p class="what">{leak["common"]:,} of {leak["shorter"]:,} tokens in common '
        f'({leak["share"]:.0%}){others}</p><p class="what">{_text(document)}</p><p>{_marked(leak["passage"])}</p>'
        f'<p class="what">{_text(test)}</p><p>{_marked(leak["test_passage"])}</p></div>'
    )


def _marked(segments: list[str]) -> str:
    """Segments of which every second one is marked, escaped, and cut if they are very long."""
    parts, left = [], _LONGEST
    for number, segment in enumerate(segments):
        shown = segment[:left]
        left -= len(shown)
        parts.append(f"<mark>{_text(shown)}</mark>" if number % 2 else _text(shown))
        if len(shown) < len(segment) or not left:
            parts.append("&hellip;")
            break
    return "".join(parts)


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())

"""Everything that wants a GPU, in one unattended call: `make test-gpu`, or

    python -m tests.gpu.report [--output runs/gpu] [--parts training parity ...]
    python -m tests.gpu.report --device cpu --tiny        # a dry run: small sizes, what needs CUDA is skipped

Each part (tests/gpu/parts.py) runs in a process of its own with a time limit, so that one that fails, crashes or hangs
hides none of the others; rows that it had already found are kept. Ends within ``--minutes``. Prints one table at the end
and writes report.json and report.md. Exit code 1 when anything failed, 0 otherwise: skipped is not failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MARK = "ROW "
ROOT = Path(__file__).parents[2]
# Seconds of each part at full size, generously. The order is that of importance: the last ones are cut when time is up.
LIMITS = {
    "environment": 90,
    "grouped_products": 90,
    "attention": 90,
    "long_attention": 120,
    "generation": 60,
    "host_reads": 90,
    "layers": 90,
    "parity": 120,
    "training": 150,
    "checkpoint": 90,
    "optimizers": 90,
    "benchmark": 240,
}


def run_part(command: list[str], limit: float) -> dict[str, Any]:
    """Run ``command``, which prints rows, for at most ``limit`` seconds. Its rows, and what ended it, as a row if badly."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        ended = "" if process.returncode == 0 else f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the group that start_new_session made: the part and whatever it started
        output, _ = process.communicate()
        ended = f"did not end in {limit:.0f} s"
    lines = output.splitlines()
    rows = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    rest = [line for line in lines if not line.startswith(MARK)]
    if ended:
        last = next((line.strip() for line in reversed(rest) if line.strip()), "no output")
        rows.append({"what": "the part itself", "outcome": "failed", "value": f"{ended}: {last}"[:300]})
    elif not rows:
        rows.append({"what": "the part itself", "outcome": "failed", "value": "printed nothing"})
    return {"rows": rows, "seconds": time.monotonic() - began, "output": rest[-60:]}


def run_all(commands: dict[str, list[str]], limits: dict[str, float], minutes: float) -> dict[str, Any]:
    """Every part in turn, each within its limit and what is left of ``minutes``."""
    end = time.monotonic() + 60 * minutes
    parts = {}
    for name, command in commands.items():
        left = end - time.monotonic()
        if left < 5:
            row = {"what": "the part itself", "outcome": "failed", "value": f"not begun: {minutes:g} minutes were over"}
            parts[name] = {"rows": [row], "seconds": 0.0, "output": []}
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        parts[name] = run_part(command, min(limits[name], left))
    return parts


def facts(parts: dict[str, Any]) -> dict[str, str]:
    return {row["what"]: row["value"] for row in parts.get("environment", {}).get("rows", [])}


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, which is also what is printed."""
    counts = report["counts"]
    lines = [
        f"# {report['device']}, {report['date']}",
        "",
        f"{counts['ok']} ok, {counts['failed']} failed, {counts['skipped']} skipped, in {report['seconds']:.0f} s. "
        f"`{report['command']}`",
        "",
        "| part | what | outcome | value |",
        "|---|---|---|---|",
    ]
    for name, part in report["parts"].items():
        for row in part["rows"]:
            value = str(row["value"]).replace("|", "\\|")
            lines.append(f"| {name} | {row['what']} | {row['outcome']} | {value} |")
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", table(report))):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args()
    options = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    began = time.monotonic()
    commands = {name: [sys.executable, "-m", "tests.gpu.parts", name, *options] for name in args.parts}
    parts = run_all(commands, dict(LIMITS), args.minutes)
    rows = [row for part in parts.values() for row in part["rows"]]
    report = {
        "device": facts(parts).get("device", f"unknown device ({args.device})"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m tests.gpu.report", *sys.argv[1:]]),
        "seconds": time.monotonic() - began,
        "counts": {kind: sum(row["outcome"] == kind for row in rows) for kind in ("ok", "failed", "skipped")},
        "parts": parts,
    }
    write(report, args.output)
    print(table(report))
    print(f"written to {args.output}/report.json and report.md", file=sys.stderr)
    return int(bool(report["counts"]["failed"]))


if __name__ == "__main__":
    sys.exit(main())

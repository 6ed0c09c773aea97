"""The commands of docs/first-run.md do what the page shows: each is run as it stands there, but for what takes minutes."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
SMALL = {"--input python-stdlib": "--input text", "--vocab-size 32000": "--vocab-size 300"}  # the same, in a second
WORDS = ["router", "expert", "token", "gradient", "tensor", "pipeline", "batch", "loss"]
ELSEWHERE = ("make train", "source .venv/bin/activate")  # tested by the continuous build, as its first step


def blocks() -> list[tuple[str, str]]:
    """(kind, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_from_data_to_the_dry_run(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "text").mkdir()
    rng = random.Random(0)
    (tmp_path / "text" / "a.txt").write_text(" ".join(rng.choices(WORDS, k=20_000)))
    called: list[str] = []
    output = ""
    for kind, text in blocks():
        if kind == "sh":
            lines = [line for line in text.splitlines() if line not in ELSEWHERE]
            script = "\n".join(lines)
            for there, here in SMALL.items():
                script = script.replace(there, here)
            called += re.findall(r"^qwen-moe (\w+)", script, flags=re.MULTILINE)
            command = f'qwen-moe() {{ "{sys.executable}" -m qwen_moe "$@"; }}\nset -e\n{script}\n'
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{script}\n{done.stderr}"
            output = done.stdout + done.stderr
        elif "prepared data/corpus" not in text:
            printed = {_bare(line) for line in output.splitlines()}
            missing = [line for line in text.splitlines() if _bare(line) not in printed]
            assert not missing, f"the page shows lines that the command does not print: {missing}\n{output}"
    assert called == ["info", "data", "pipeline", "plan", "launch"]
    assert (tmp_path / "runs" / "my_model-pipeline" / "pipeline.md").exists()


def _bare(line: str) -> str:
    """Without what may differ: numbers, and the hash in the name of a job."""
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"-[0-9a-f]{6}$", "-HASH", line.strip()))


def test_every_file_and_page_that_it_names_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target

"""Nothing that is read may run: no reader in the code that executes what a file asks for, by syntax tree."""

import ast
from pathlib import Path

import pytest
import yaml

from qwen_moe import documents
from qwen_moe.errors import UserError

ROOT = Path(__file__).parents[1]
# Readers that run code, or may; torch.load and transformers' only without the argument that forbids it.
RUNS = {
    "eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "dcp.FileSystemReader", "FileSystemReader", "DefaultLoadPlanner", "joblib.load", "shelve.open",
}  # fmt: skip
NEEDS = {"torch.load": ("weights_only", True), "from_pretrained": ("trust_remote_code", False)}
# What a process wrote itself a moment ago, into a folder that only it may read, or holds in memory.
OWN = {("parallel/local_group.py", "pickle.loads"), ("parallel/trace.py", "pickle.loads")}
# Answers of a model and their tests: to run them is what the user asked for, in a process with limits (docs/rollouts.md).
ASKED = {("qwen_moe/rollout/code_child.py", "exec")}
SAFE = {("qwen_moe/documents.py", "yaml.load")}  # with a loader that is a SafeLoader (below)


def found_in(source: str) -> set[str]:
    """Calls of ``source`` that may run what they read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in RUNS:
            found.add(name)
        for reader, (argument, value) in NEEDS.items():
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            theirs = name.startswith(("torch.", "Auto", "transformers.")) and name.endswith(reader)
            if theirs and given.get(argument) != str(value):
                found.add(name)
        if name.endswith(("numpy.load", "np.load")) and "allow_pickle=True" in ast.unparse(node):
            found.add(name)
    return found


@pytest.mark.parametrize("folder", ["qwen_moe", "parallel", "launchers", "scaling_laws"])
def test_no_reader_that_runs_what_it_reads(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        found = {(name, call) for call in found_in(path.read_text(encoding="utf-8"))}
        assert found <= OWN | SAFE | ASKED, found - OWN - SAFE - ASKED


def test_recipes_are_read_by_a_safe_loader() -> None:
    assert issubclass(documents._Loader, yaml.SafeLoader)
    with pytest.raises(UserError):
        documents.yaml_value("a: !!python/object/apply:os.getcwd []", "recipe")


def test_the_checker_sees_them() -> None:
    assert found_in("import pickle\npickle.loads(b'')") == {"pickle.loads"}
    assert found_in("torch.load(path)") == found_in("torch.load(path, weights_only=False)") == {"torch.load"}
    assert found_in("torch.load(path, weights_only=True)") == set()
    assert found_in("AutoTokenizer.from_pretrained(path)") == {"AutoTokenizer.from_pretrained"}
    assert found_in("AutoTokenizer.from_pretrained(path, trust_remote_code=False)") == set()
    assert found_in("eval(text)") == {"eval"} and found_in("model.eval()") == set()

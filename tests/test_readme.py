"""The tree in README.md is the tree: every module is named in it, and everything it names exists.

A line of it is names, two spaces, and what they are. Names are relative to the folder that the line is indented under;
one that ends in ``/`` is a folder.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("qwen_moe", "parallel", "scaling_laws", "launchers")


def tree_paths(readme: str) -> list[str]:
    """Every path that the tree under "Source tree" names, relative to the repository; folders end in ``/``."""
    lines = readme.split("\n## Source tree\n")[1].split("\n## ")[0].splitlines()
    found: list[str] = []
    folders: list[str] = []  # the folder at each depth of indentation
    for line in lines:
        if not line.startswith("    "):
            continue
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        assert depth <= len(folders), f"indented too deep: {line}"
        names = line.strip().split("  ")[0].split(" ")
        del folders[depth:]
        prefix = folders[-1] if folders else ""
        found += [prefix + name for name in names]
        folders.append(prefix + names[-1] if names[-1].endswith("/") else prefix)
    return found


def modules() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }


def test_every_module_is_in_the_tree_once() -> None:
    paths = tree_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    named = [path for path in paths if path.endswith(".py")]
    assert sorted(modules() - set(named)) == [], "not in README.md's tree"
    assert len(named) == len(set(named)), "named twice in README.md's tree"


def test_everything_in_the_tree_exists() -> None:
    for path in tree_paths((ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_names_are_relative_to_the_folder_above_them() -> None:
    readme = (
        "# x\n\n## Source tree\n\n    a/  one\n      b.py c.py  two\n      d/  three\n        e.py  four\n    f/  f\n"
    )
    assert tree_paths(readme) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.py", "f/"]

"""Which recipe that comes with the package writes a folder that is missing: the demonstrations build on one another."""

from pathlib import Path

import yaml

from qwen_moe.config.recipe_verbs import VERBS

# In the repository this is a link to recipes/ at the top; a wheel holds the files.
RECIPES = Path(__file__).parents[1] / "recipes"


def writer(path: Path) -> str:
    """The end of a message that ``path`` is missing: the command that writes it, or nothing if no recipe of ours does."""
    for file in sorted(RECIPES.glob("*.yaml")):
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            folder = Path(values["run_dir"])
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
        if path == folder or folder in path.parents:
            verb = next((verb for verb, keys in VERBS.items() if keys.issuperset(values)), "qwen-moe train")
            return f". `{verb} recipes/{file.name}` writes it: run that first"
    return ""

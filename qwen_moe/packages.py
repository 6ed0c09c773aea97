"""Packages that only some work needs, each in an extra of pyproject.toml; one message where they are missing."""

from importlib.util import find_spec

from qwen_moe.errors import UserError

EXTRAS = {
    "scipy": "scaling",
    "pandas": "scaling",
    "matplotlib": "plot",
    "zstandard": "data",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def is_installed(name: str) -> bool:
    """Whether ``name`` can be found; it is not imported."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def missing_text(*names: str) -> str:
    """What is said where some of ``names`` (keys of `EXTRAS`) are not installed, with the fix; empty where all are."""
    absent = [name for name in names if not is_installed(name)]
    if not absent:
        return ""
    extras = ",".join(sorted({EXTRAS[name] for name in absent}))
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed: pip install 'qwen-moe[{extras}]'"


def check_installed(what: str, *names: str, otherwise: str = "") -> None:
    """Raises UserError where some of ``names`` are missing. ``what`` needs them; ``otherwise`` is another way out."""
    if text := missing_text(*names):
        raise UserError(f"{what}: {text}{otherwise and ', or '}{otherwise}")

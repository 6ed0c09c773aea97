"""Optional packages, each in an extra of pyproject.toml, and the message for missing ones."""

from importlib.util import find_spec

from qwen_moe.errors import UserError

EXTRAS = {
    "scipy": "scaling",
    "pandas": "scaling",
    "matplotlib": "plot",
    "zstandard": "data",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "math_verify": "rl",
    "datatrove": "curate",
    "pyarrow": "curate",
    "lm_eval": "eval",
}


def is_installed(name: str) -> bool:
    """Whether package ``name`` is installed, without importing it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def missing_text(*names: str) -> str:
    """The message with the fix if some of ``names`` (keys of `EXTRAS`) are not installed; empty if all are installed."""
    absent = [name for name in names if not is_installed(name)]
    if not absent:
        return ""
    extras = ",".join(sorted({EXTRAS[name] for name in absent}))
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed: pip install 'qwen-moe[{extras}]'"


def check_installed(what: str, *names: str, otherwise: str = "") -> None:
    """Raise UserError if some of ``names`` are missing. ``what`` needs them; ``otherwise``: an alternative to installing."""
    if text := missing_text(*names):
        raise UserError(f"{what}: {text}{otherwise and ', or '}{otherwise}")

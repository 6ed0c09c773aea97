"""Scores by a function of one's own: ``module:function(text, metadata)`` returns a number, or one for each dimension."""

import hashlib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_moe.curation.scores.annotate import ERROR, Doc
from qwen_moe.errors import UserError


class FunctionScorer:
    """Scores of the function ``name``, in this process. A number is the score of the dimension that the function's name is.
    Raises UserError for a function that cannot be imported."""

    def __init__(self, name: str) -> None:
        self._module, _, self._function = name.partition(":")
        self._call, self._file = load_function(self._module, self._function)

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        return [self._one(document) for document in documents]

    def _one(self, document: Doc) -> dict[str, Any]:
        try:
            return {"scores": self._scores(self._call(document.text, dict(document.metadata)))}
        except Exception as error:
            return {ERROR: f"{type(error).__name__}: {error}"[:200] + f" ({self._place(error)})"}

    def _scores(self, value: Any) -> dict[str, float]:
        given = value if isinstance(value, Mapping) else {self._function: value}
        if not given or not all(isinstance(name, str) for name in given):
            raise ValueError(f"it returned {value!r:.60}, expected a number, or a number for each dimension")
        found = {}
        for name, one in given.items():
            if isinstance(one, str | bytes) or not hasattr(one, "__float__"):
                raise ValueError(f"it returned {one!r:.60} for {name}, expected a number")
            found[name] = float(one)
            if not math.isfinite(found[name]):
                raise ValueError(f"it returned {found[name]} for {name}, expected a finite number")
        return found

    def _place(self, error: BaseException) -> str:
        """File and line of the function's module where it failed, or the function itself."""
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if os.path.realpath(frame.filename) == os.path.realpath(self._file):
                return f"{Path(frame.filename).name}, line {frame.lineno}"
        code = getattr(self._call, "__code__", None)
        line = f", line {code.co_firstlineno}" if code is not None else ""
        return f"{Path(self._file).name or self._module}{line}"

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(Path(self._file).read_bytes()).hexdigest() if os.path.isfile(self._file) else ""
        return {"scorer": f"{self._module}:{self._function}", "file": digest}


def load_function(module: str, function: str) -> tuple[Callable[[str, dict[str, Any]], Any], str]:
    """A function and the file that defines its module. The module is found from the current folder, too."""
    name = f"{module}:{function}"
    fix = "give MODULE:FUNCTION of a module that Python finds from the current folder"
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module raises what it likes
        raise UserError(
            f"scorer {name} cannot be imported: {type(error).__name__}: {error}. {fix.capitalize()}"
        ) from None
    finally:
        if here in sys.path:
            sys.path.remove(here)
    call = getattr(found, function, None)
    if not callable(call):
        raise UserError(f"scorer {name}: the module has no function {function}: {fix}")
    return call, str(getattr(found, "__file__", None) or "")

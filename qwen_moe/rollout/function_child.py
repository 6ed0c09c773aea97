"""The process in which reward functions run. Run as a script by `warden.py`; imports nothing of ours.

Arguments: bytes of address space, seconds for a call, and the pipes of requests and answers.
"""

import hashlib
import importlib
import inspect
import json
import math
import os
import random
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

Function = Callable[[str, str, dict[str, Any]], Any]


def found(text: str) -> Function:
    """1 if the regular expression is found."""
    expression = re.compile(text, re.DOTALL)
    return lambda prompt, completion, row: float(expression.search(completion) is not None)


def checked_by_math_verify() -> Function:
    """math-verify with its own limits of time off: they use SIGALRM, and the warden has its own."""
    from math_verify import parse, verify

    def check(prompt: str, completion: str, row: dict[str, Any]) -> float:
        answer = row["answer"]
        given = parse(completion, parsing_timeout=None)
        for one in answer if isinstance(answer, list) else [answer]:
            text = str(one)
            right = parse(text if "$" in text or "\\" in text else f"${text}$", parsing_timeout=None)
            if not right:
                raise ValueError(f"math-verify cannot read the answer {text!r}")
            if verify(right, given, timeout_seconds=None):
                return 1.0
        return 0.0

    return check


def load(name: str) -> tuple[Function, str]:
    """A function, and the file that defines it (empty for our own)."""
    kind, _, rest = name.partition(":")
    if kind == "format":
        return found(rest), ""
    if name == "math":
        return checked_by_math_verify(), ""
    module = importlib.import_module(kind)
    if not hasattr(module, rest):
        raise AttributeError(f"module {kind} ({getattr(module, '__file__', None)}) has no {rest}")
    function = getattr(module, rest)
    if not callable(function):
        raise TypeError(f"{rest} of module {kind} is {type(function).__name__}, not a function")
    inspect.signature(function).bind("prompt", "completion", {})
    return function, str(getattr(module, "__file__", None) or "")


def seed(arguments: list[Any]) -> None:
    """The same random numbers for the same answer, whichever process scores it."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).digest()
    random.seed(digest)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(int.from_bytes(digest[:4], "little"))


def call(function: Function, arguments: list[Any]) -> dict[str, Any]:
    seed(arguments)
    value = function(*arguments)
    is_number = isinstance(value, int | float) or (hasattr(value, "__float__") and not isinstance(value, str | bytes))
    if not is_number:
        return {"kind": "returned no finite number", "text": f"it returned {value!r:.60}"}
    value = float(value)
    if not math.isfinite(value):
        return {"kind": "returned no finite number", "text": f"it returned {value}"}
    return {"value": value}


def main() -> None:
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    requests, answers = int(sys.argv[3]), int(sys.argv[4])
    for pipe in (requests, answers):
        os.set_inheritable(pipe, False)
    sys.path[0] = os.getcwd()  # not the folder of this file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    loaded: dict[str, tuple[Function, str]] = {}
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                if "load" in request:
                    name = request["load"]
                    if name not in loaded:
                        loaded[name] = load(name)
                    answer = {"value": loaded[name][1]}
                else:
                    used = resource.getrusage(resource.RUSAGE_SELF)
                    allowed = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
                    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
                    answer = call(loaded[request["call"]][0], request["arguments"])
            except Exception as error:
                answer = {"kind": "raised an exception", "text": f"{type(error).__name__}: {error}"[:300]}
            os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()

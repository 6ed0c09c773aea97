"""The process in which the code of one answer and its tests run. Run as a script by `warden.py`; imports nothing of ours.

Arguments: bytes of address space, seconds, and the pipes of requests and answers. Code and tests share one namespace, whose
``__name__`` is "answer". Standard input and output are empty.
"""

import json
import math
import os
import resource
import sys
from typing import Any

_LARGEST_FILE = 64 << 20  # bytes


def run(code: str, tests: list[str]) -> dict[str, Any]:
    """``{"value": 1.0}`` if all tests pass, else what failed."""
    namespace: dict[str, Any] = {"__name__": "answer"}
    where = "the code"
    try:
        exec(compile(code, "answer", "exec"), namespace)
        for number, test in enumerate(tests, 1):
            where = f"test {number} of {len(tests)}"
            exec(compile(test, "tests", "exec"), namespace)
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too
        return {"kind": "failed", "text": f"{where} raised {type(error).__name__}: {error}"[:300]}
    return {"value": 1.0}


def main() -> None:
    memory, seconds = int(sys.argv[1]), math.ceil(float(sys.argv[2])) + 1
    requests, answers = int(sys.argv[3]), int(sys.argv[4])
    for pipe in (requests, answers):
        os.set_inheritable(pipe, False)
    with os.fdopen(requests, "rb") as lines:
        lines.readline()
        os.write(answers, b"{}\n")  # ready
        request = json.loads(lines.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    nonce = request["nonce"]
    answer = run(request["code"], request["tests"]) | {"nonce": nonce}
    os.write(answers, json.dumps(answer).encode() + b"\n")
    os._exit(0)  # whatever threads and exit handlers the code has left


if __name__ == "__main__":
    main()

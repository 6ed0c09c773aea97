"""Reward functions that tests name as ``tests.rollout.functions:NAME``."""

import os
import random
import subprocess
import time
from typing import Any

Row = dict[str, Any]


def length(prompt: str, completion: str, row: Row) -> float:
    return len(prompt) + 10 * len(completion) + 100 * row.get("bonus", 0)


def chance(prompt: str, completion: str, row: Row) -> float:
    return random.random()


def misbehaves(prompt: str, completion: str, row: Row) -> Any:
    """What the completion asks for, and 1 for anything else."""
    if completion == "hang":
        # A child in a session of its own, which a signal to the process group does not reach.
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        with open(row["pid"], "w") as file:
            file.write(str(child.pid))
        time.sleep(300)
    if completion == "throw":
        raise KeyError("no such thing")
    if completion == "exit":
        os._exit(3)
    if completion == "memory":
        return float(len(bytearray(8 << 30)))
    print("printed by the function")  # must not be taken for an answer
    return {"nan": float("nan"), "infinite": float("inf"), "text": "3", "none": None, "true": True}.get(completion, 1)

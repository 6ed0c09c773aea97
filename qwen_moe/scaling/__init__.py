"""`qwen-moe scaling`: the verbs of scaling_laws, and those that read recipes and runs."""

import argparse

from qwen_moe.alone import alone
from qwen_moe.scaling import collect, ladder, next_runs, predict
from scaling_laws.cli import register as register_scaling_laws


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `scaling` and all its verbs."""
    verbs = register_scaling_laws(subparsers)
    verbs.choices["fit"].set_defaults(saving=alone)
    ladder.register(verbs)
    next_runs.register(verbs)
    collect.register(verbs)
    predict.register(verbs)

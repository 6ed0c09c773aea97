"""Measures the processor time of one search of `qwen-moe plan`, in a process that has planned nothing before.

    OMP_NUM_THREADS=1 python benchmarks/plan_speed.py recipes/turbo_style.yaml 1024 [section.key=value ...]

Importing torch, about two seconds, is not in it.
"""

import sys
import time
from pathlib import Path

from qwen_moe.config import load_stage
from qwen_moe.planning.hardware import Cluster, load_gpu, load_network
from qwen_moe.planning.search import Search


def main() -> None:
    recipe, gpus, *overrides = sys.argv[1:]
    config = load_stage(Path(recipe), overrides, "")
    search = Search(config, int(gpus), Cluster(load_gpu("h100-80gb"), load_network("ib400"), 8))
    begin = time.process_time()
    plan = search.run(5)
    print(f"{plan.legal:,} legal layouts on {gpus} GPUs: {time.process_time() - begin:.1f} s of processor time")


if __name__ == "__main__":
    main()

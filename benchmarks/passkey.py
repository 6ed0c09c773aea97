"""How far the model of recipes/passkey_demo.yaml finds a key, and with which extension of its context.

    qwen-moe train recipes/passkey_demo.yaml
    python benchmarks/passkey.py                          # 20 minutes and more; the same command goes on where it stopped
    python benchmarks/passkey.py --figures                # only draws benchmarks/passkey.json again

Evaluates the same prompts, ten depths at each length, in four ways. A million tokens are read by sparse attention only:
dense attention would take 200 times as many query-key pairs. Writes benchmarks/passkey.json and docs/images/passkey.png.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from launchers.folder.atomic import replaced, write_text
from qwen_moe.evaluation.results import grid_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "passkey.json"
PICTURE = ROOT / "docs" / "images" / "passkey.png"
LENGTHS, LONGEST = (512, 2048, 8192, 65536), 1_048_576
SHORT_CHUNKS = ("--chunk-size", "512")
WAYS: dict[str, tuple[str, ...]] = {
    "no extension": ("--context-extension", "plain"),
    "YaRN": ("--context-extension", "yarn"),
    "dual chunk attention": SHORT_CHUNKS,
    "dual chunk attention, sparse": (*SHORT_CHUNKS, "--attention", "sparse", "--kept-share", "0.05"),
}


def evaluated(checkpoint: Path, folder: Path, way: str) -> dict[str, Any]:
    """The results of one way, and the most memory that a process of this script had so far, in bytes."""
    lengths = (*LENGTHS, LONGEST) if "sparse" in way else LENGTHS
    command = [sys.executable, "-m", "qwen_moe", "evaluate", "passkey", "--checkpoint", str(checkpoint), "--json"]
    command += ["--lengths", ",".join(map(str, lengths)), "--output", str(folder / way.replace(" ", "_")), *WAYS[way]]
    print(" ".join(command[1:]), file=sys.stderr)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {**json.loads(done.stdout), "peak_bytes": peak}


def draw(results: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lengths = (*LENGTHS, LONGEST)
    figure, panels = plt.subplots(1, len(results), figsize=(13, 3.8), sharey=True, layout="constrained")
    colors = matplotlib.colormaps["RdYlGn"].with_extremes(bad="#dddddd")
    for axes, (way, found) in zip(panels, results.items(), strict=True):
        known, depths, scores = grid_of(found)
        missing = [float("nan")] * (len(lengths) - len(known))
        axes.imshow([[*row, *missing] for row in scores], aspect="auto", cmap=colors, vmin=0, vmax=100)
        axes.set_title(way, fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        for place in range(len(known), len(lengths)):
            axes.text(place, (len(depths) - 1) / 2, "not run", rotation=90, ha="center", va="center", fontsize=8)
    panels[0].set_ylabel("depth of the key")
    figure.supxlabel("tokens of prompt and completion; trained on at most 1,024", fontsize=10)
    with replaced(PICTURE) as file:
        figure.savefig(file, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/passkey_demo"))
    parser.add_argument("--output", type=Path, default=Path("evaluation/passkey_demo"), help="folder of the answers")
    parser.add_argument("--figures", action="store_true")
    args = parser.parse_args()
    if args.figures:
        results = json.loads(RESULTS.read_text())
    else:
        results = {way: evaluated(args.checkpoint, args.output, way) for way in WAYS}
        write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    for way, found in results.items():
        print(f"{way}: peak memory so far {found['peak_bytes'] / 1e9:.2f} GB")
        for row in found["by_length"]:
            print("   ", {name: value for name, value in row.items() if name != "prompt_tokens"})
    draw(results)
    print(PICTURE)


if __name__ == "__main__":
    main()

"""The held-out run at the recommended learning rate and batch, and four neighbours of it, as recipes:

python benchmarks/ladder/neighbours.py FIT_DIR OUTPUT_DIR [--recipe RECIPE.yaml] [section.key=value ...]
"""

import argparse
import json
from pathlib import Path

from launchers.folder.atomic import write_json, write_text
from qwen_moe.config import RunConfig, dump_config, load_config
from qwen_moe.models.flops import count_parameters
from scaling_laws.fitting import load_fit
from scaling_laws.recommend import Request, recommend

# name, factor of the learning rate, factor of the batch
POINTS = (
    ("recommended", 1.0, 1.0),
    ("rate_doubled", 2.0, 1.0),
    ("rate_halved", 0.5, 1.0),
    ("batch_doubled", 1.0, 2.0),
    ("batch_halved", 1.0, 0.5),
)


def at_point(config: RunConfig, name: str, rate: float, batch: int, output: Path) -> RunConfig:
    micro = max(m for m in range(1, config.training.micro_batch_size + 1) if batch % m == 0)
    training = config.training.model_copy(update={"global_batch_size": batch, "micro_batch_size": micro})
    optimizer = config.optimizer.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"training": training, "optimizer": optimizer, "run_dir": output / "runs" / name})


def main(fit: Path, output: Path, recipe: Path, overrides: list[str]) -> None:
    config = load_config(recipe, overrides)
    size = count_parameters(config.model)
    found = recommend(
        load_fit(fit),
        Request(
            n_total=float(size.non_vocabulary_total),
            n_active=float(size.non_vocabulary_activated),
            tokens=float(config.training.train_tokens),
            seq_len=config.data.sequence_length,
        ),
    )
    rate = float(f"{found['learning_rate']:.3g}")
    # At least two, so that it can be halved.
    batch = max(2, 2 * round(found["batch_size_tokens"] / config.data.sequence_length / 2))
    for name, by_rate, by_batch in POINTS:
        point = at_point(config, name, rate * by_rate, round(batch * by_batch), output)
        write_text(output / f"{name}.yaml", dump_config(point))
    write_json(output / "prediction.json", found)
    print(json.dumps({"learning_rate": rate, "batch_size": batch, "predicted_loss": found["predicted_loss"]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fit", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("held_out.yaml"))
    args = parser.parse_args()
    main(args.fit, args.output, args.recipe, args.overrides)

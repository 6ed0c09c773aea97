"""The recipes of the benchmark's ladder: python benchmarks/ladder/design.py LADDER_DIR [section.key=value ...]

Three sizes, 8 and 32 experts (2 active): trunks in a star of learning rates and batches, and with 8 experts, for a third
of the tokens, branches off some of them where it decays.
`qwen-moe scaling ladder` chooses by itself; here sizes are far below those that its prior (Step Law) was fitted to.
"""

import sys
from pathlib import Path

import yaml

from qwen_moe.config import ModelConfig, dump_config, load_config, parse_config
from qwen_moe.models.flops import count_parameters
from qwen_moe.scaling.ladder import write_ladder, write_recipes
from scaling_laws.ladder import Run

# (factor of the learning rate, sequences in a batch); as many of the first as `branches` says also for the shorter duration
STAR = ((1.0, 2), (0.5, 2), (2.0, 2), (1.0, 4), (2.0, 4), (1.0, 8))
FOUR = ((1.0, 2), (0.5, 2), (1.0, 4), (2.0, 4))
THREE = FOUR[:3]
LOWER = ((0.5, 2), (1.0, 4))  # added when the middle size was seen to want a lower rate than was expected
# hidden size, layers, experts, learning rate in the middle, tokens of trunks, tokens of branches, grid, branches
GROUPS = (
    (32, 2, 8, 7e-3, 1_000_000, 333_000, STAR, 4),
    (64, 3, 8, 5e-3, 600_000, 200_000, FOUR, 3),
    (96, 4, 8, 1.75e-3, 300_000, 100_000, THREE, 3),
    (96, 4, 32, 1.75e-3, 300_000, 300_000, THREE, 0),
    (64, 3, 8, 2.5e-3, 600_000, 200_000, LOWER, 2),
    (32, 2, 32, 7e-3, 333_000, 333_000, THREE, 0),
)
DECAY_SHARE, WARMUP_SHARE = 0.2, 0.04  # of the run's tokens; of the shorter one's, for both


def main(output: Path, overrides: list[str]) -> None:
    config = load_config(Path(__file__).with_name("held_out.yaml"), overrides)
    models: list[ModelConfig] = []
    runs: list[Run] = []
    warmup: list[int] = []
    for hidden, layers, experts, rate, long, short, grid, branches in GROUPS:
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 16,
            "num_key_value_heads": hidden // 32,
            "moe_intermediate_size": hidden,
            "num_experts": experts,
        }
        model = ModelConfig(**(config.model.model_dump() | shape))
        count = count_parameters(model)
        first = len(runs)
        group = 1 + runs[-1].group if runs else 0
        for turn, (tokens, chosen) in enumerate(((long, grid), (short, grid[:branches]))):
            for number, (step, batch) in enumerate(chosen):
                models.append(model)
                warmup.append(int(WARMUP_SHARE * short))
                runs.append(
                    Run(
                        group=group + turn,
                        trunk=first + number if turn else None,
                        n_total=float(count.non_vocabulary_total),
                        n_active=float(count.non_vocabulary_activated),
                        tokens=float(tokens),
                        learning_rate=rate * step,
                        batch_tokens=float(batch * config.data.sequence_length),
                        flops=6.0 * count.non_vocabulary_activated * tokens * (DECAY_SHARE if turn else 1.0),
                    )
                )
    recipes, rows = write_recipes(config, models, runs, output)
    for (name, text), tokens in zip(recipes.items(), warmup, strict=True):
        values = yaml.safe_load(text)
        values["schedule"]["warmup_tokens"] = tokens
        recipes[name] = dump_config(parse_config(values, name))
    write_ladder(output, recipes, rows)
    print(f"{len(rows)} recipes, {sum(row['flops'] for row in rows):.3g} FLOPs, in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Runs of the third ladder at smaller batches, as recipes: python benchmarks/ladder/third/round_2.py TARGET.yaml OUTPUT_DIR

After the first round of `qwen-moe scaling next`, the best runs of the two larger sizes had the smallest batches. Those that
`next` then advised had 1 to 7 sequences of 32 tokens, which this machine cannot train in time.
"""

import sys
from pathlib import Path

from qwen_moe.config import ModelConfig, load_config
from qwen_moe.models.flops import count_parameters
from qwen_moe.scaling.ladder import write_ladder, write_recipes
from scaling_laws.ladder import Run

# hidden size, tokens, ((learning rate, sequences in a batch), ...)
GROUPS = (
    (16, 441_600, ((5.7e-3, 10), (8.5e-3, 20))),
    (32, 424_320, ((3.2e-3, 5), (7.2e-3, 5))),
    (32, 1_697_280, ((3.2e-3, 14), (1.6e-3, 14), (6.4e-3, 14), (3.2e-3, 28))),
    (48, 943_040, ((2.6e-3, 7), (1.3e-3, 7), (5.2e-3, 7), (1.3e-3, 20))),
    (48, 1_886_080, ((2.6e-3, 14), (1.3e-3, 14), (5.2e-3, 14))),
)


def main(target: Path, output: Path) -> None:
    config = load_config(target, [])
    models: list[ModelConfig] = []
    runs: list[Run] = []
    for group, (hidden, tokens, points) in enumerate(GROUPS):
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_attention_heads": hidden // 16,
            "num_key_value_heads": hidden // 16,
            "moe_intermediate_size": hidden,
        }
        model = ModelConfig(**(config.model.model_dump() | shape))
        count = count_parameters(model)
        for rate, batch in points:
            models.append(model)
            runs.append(
                Run(
                    group=group,
                    trunk=None,
                    n_total=float(count.non_vocabulary_total),
                    n_active=float(count.non_vocabulary_activated),
                    tokens=float(tokens),
                    learning_rate=rate,
                    batch_tokens=float(batch * config.data.sequence_length),
                    flops=6.0 * count.non_vocabulary_activated * tokens,
                )
            )
    recipes, rows = write_recipes(config, models, runs, output)
    write_ladder(output, recipes, rows)
    print(f"{len(rows)} recipes, {sum(row['flops'] for row in rows):.3g} FLOPs, in {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

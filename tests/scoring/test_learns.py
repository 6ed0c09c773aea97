"""From prepared pairs to scores: a reward model that was trained on judged pairs prefers the better answers of others."""

import random
from pathlib import Path

import torch

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.rows import ExampleSet, OpenSet, Order
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.scoring.model import ScoringModel
from qwen_moe.verify.ranks import make_trainer
from tests.data.test_prepare_chat import prepared
from tests.distributed import run_distributed
from tests.scoring.conftest import VOCABULARY
from tests.small import model_values

CRITERIA, ROW, STEPS, BATCH = ("short", "polite"), 128, 40, 8
WORDS = ("alpha", "beta", "gamma", "def")


def pairs(count: int, seed: int) -> list[dict[str, object]]:
    """Polite answers say "return"; short ones have fewer words. The two are independent."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [rng.choices(WORDS, k=length) for length in rng.sample((1, 4), 2)]
        polite = rng.randrange(2)
        words[polite][rng.randrange(len(words[polite]))] = "return"
        judged = {"short": 1 if len(words[0]) < len(words[1]) else -1, "polite": 1 if polite == 0 else -1}
        chosen, rejected = map(" ".join, words)
        rows.append({"prompt": rng.choice(WORDS), "chosen": chosen, "rejected": rejected, "preferences": judged})
    return rows


def run(folder: Path) -> RunConfig:
    values = {
        "run_dir": str(folder / "run"),
        "model": model_values(vocab_size=VOCABULARY, max_position_embeddings=256, hidden_size=32),
        "objective": {"kind": "reward_model", "reward": {"criteria": list(CRITERIA), "weights": [1, 1]}},
        "data": {"train": [{"prefix": str(folder / "out")}], "sequence_length": ROW},
        "training": {"micro_batch_size": 4, "global_batch_size": BATCH, "train_tokens": STEPS * BATCH * ROW},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"export_hf": False},
    }
    return parse_config(values, "test")


def _train(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    config = run(folder)
    trainer = make_trainer(config)
    order = Order(length=ROW, seed=1, least_rows=BATCH * STEPS)
    examples = PackedExamples([ExampleSet(prefix=folder / "out")], order, vocab_size=VOCABULARY, cache=folder)
    examples.judge_by(config.model.criteria)
    metrics = []
    for step in range(STEPS):
        batches = [examples.train_batch(BATCH * step + first, 4) for first in (0, 4)]
        result = trainer.step(step, batches)
        metrics.append({"loss": result.loss} | result.metrics)
    return {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()}, metrics


def test_it_prefers_the_better_answers_of_other_pairs(tokenizer: Path, tmp_path: Path) -> None:
    prepared(tokenizer, tmp_path, pairs(120, 1))
    weights, metrics = run_distributed(_train, 1, tmp_path)[0]
    assert metrics[0]["loss"] > 0.4 and metrics[-1]["loss"] < 0.2 and metrics[-1]["accuracy"] > 0.9
    model = DecoderLM(run(tmp_path).model)
    model.load_state_dict(weights, strict=False)
    (tmp_path / "held-out").mkdir()
    held_out = pairs(60, 2)
    prepared(tokenizer, tmp_path / "held-out", held_out)
    one = OpenSet(tmp_path / "held-out" / "out", ROW, "error")
    answers = [
        one.tokens[one.at(document)][: one.judged(document, CRITERIA)[0] + 1].tolist() for document in range(120)
    ]
    scores = ScoringModel(model).scores(answers)
    for place, name in enumerate(CRITERIA):
        right = [
            (float(scores[2 * n, place] - scores[2 * n + 1, place]) > 0) == (row["preferences"][name] > 0)  # type: ignore[index]
            for n, row in enumerate(held_out)
        ]
        assert sum(right) >= 54, (name, sum(right))

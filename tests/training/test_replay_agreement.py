"""With routing replay, training gives sampled tokens the log-probabilities with which they were drawn."""

import pytest
import torch
import torch.distributed as dist

from parallel.data import local
from parallel.mesh import Layout
from qwen_moe.checkpoint.tensor_store import ModuleTensors
from qwen_moe.config import RunConfig
from qwen_moe.data.replay import experts_of_row
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.generation.engine import Completion, Engine
from qwen_moe.generation.ranks import ShardedRunner, gather_shares, load_sharded
from qwen_moe.generation.sampling import Sampling
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.init import build_model
from qwen_moe.sharding.build import DTYPES
from qwen_moe.training.step import Trainer
from qwen_moe.verify.case import layout_overrides
from qwen_moe.verify.ranks import make_trainer
from tests.distributed import run_distributed
from tests.small import exact_run, model_values

LENGTH, SAMPLES = 48, 2
PROMPTS = [[7, 3, 9], [5], [1, 2, 3, 4, 5, 6, 7, 8], [11, 4]]


def run(layout: Layout, precision: str) -> RunConfig:
    """32 experts in pairs whose logits are almost equal, 5 of them for each token: one pair is always torn apart."""
    values = model_values(
        vocab_size=31,
        hidden_size=32,
        num_hidden_layers=3,
        num_experts=32,
        num_experts_per_tok=5,
        initializer_range=0.1,
        max_position_embeddings=LENGTH,
    )
    rows = len(PROMPTS) * SAMPLES // 2
    return exact_run(
        values,
        LENGTH,
        precision={"compute": precision, "master": "fp32"},
        objective__kind="grpo",
        training__micro_batch_size=rows // layout.dp,
        training__global_batch_size=rows,
        training__train_tokens=rows * LENGTH,
        parallel=layout_overrides(layout),
    )


def weights(config: RunConfig) -> DecoderLM:
    """A model whose experts 2e and 2e + 1 have routers that differ in the last digits of ``precision.compute``, and outputs
    that tell which of them was taken."""
    model = build_model(config.model, 5, torch.float32)
    apart = {"fp32": 1e-7, "bf16": 2.0**-8}[config.precision.compute]
    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight.data
        rows[1::2] = rows[0::2] * (1 + apart * torch.randn(rows[0::2].shape, generator=generator))
        layer.mlp.experts.down_proj.data *= 6
    return model


def sample(config: RunConfig, trainer: Trainer, model: DecoderLM) -> list[list[Completion]]:
    """The answers of all ranks, by our own generator in the layout of training."""
    grids, dtype = trainer.grids, DTYPES[config.precision.compute]
    part = load_sharded(config.model, ModuleTensors(model), grids, dtype, torch.device("cpu"), "the test")
    runner = ShardedRunner(part, grids, torch.device("cpu"))
    numbers = runner.share_of(range(len(PROMPTS)))
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=1.0, samples=SAMPLES, seed=1)
    engine = Engine(runner, config.model, end_tokens=[0])
    answers = engine.generate([PROMPTS[i] for i in numbers], sampling, numbers=numbers, routing=True)
    dist.barrier()
    return gather_shares(answers, grids, len(PROMPTS))


def packed(answers: list[list[Completion]]) -> dict[str, torch.Tensor]:
    """Two answers a row, each a document of its prompt and itself; ``drawn``: the log-probabilities of sampling."""
    flat = [(prompt, one) for prompt, of_prompt in zip(PROMPTS, answers, strict=True) for one in of_prompt]
    rows = []
    for pair in zip(flat[0::2], flat[1::2], strict=True):
        row = {
            "input_ids": torch.zeros(LENGTH, dtype=torch.int64),
            "labels": torch.full((LENGTH,), IGNORE),
            "drawn": torch.zeros(LENGTH),
            "ends": torch.zeros(LENGTH, dtype=torch.bool),
        }
        begin, documents = 0, []
        for prompt, answer in pair:
            assert answer.routing is not None
            documents.append((begin, answer.routing.whole()))
            tokens, end = torch.tensor([*prompt, *answer.tokens]), begin + len(prompt) + len(answer.tokens)
            row["input_ids"][begin:end] = tokens
            learned = slice(begin + len(prompt) - 1, end - 1)
            row["labels"][learned] = tokens[len(prompt) :]
            row["drawn"][learned] = torch.tensor(answer.log_probs)
            row["ends"][end - 1] = True
            begin = end
        row["counted"] = torch.arange(LENGTH) < begin
        rows.append(row | {"experts": experts_of_row(LENGTH, documents)})
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | documents_of(batch.pop("ends"))


def fill(trainer: Trainer, model: DecoderLM) -> None:
    """Give the trained model the weights of ``model``."""
    whole = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        offsets, sizes = trainer.model.range_of(name, parameter)
        place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        local(parameter.data).copy_(whole[name].data[place])


def _differences(config: RunConfig) -> tuple[float, float, int]:
    """This rank's largest difference of a learned token's log-probability with and without replay; learned tokens here."""
    trainer, model = make_trainer(config), weights(config)
    fill(trainer, model)
    whole = packed(sample(config, trainer, model))
    rows = config.training.micro_batch_size
    batch = {name: x[trainer.grids.dp.index * rows :][:rows] for name, x in whole.items()}
    found: dict[bool, float] = {}
    for replayed in (True, False):
        given = trainer.sequence.of_batch({name: x for name, x in batch.items() if replayed or name != "experts"})
        drawn = given.pop("drawn")
        with torch.no_grad():
            (output,) = trainer.engine.forward([given])
        trainer.model.reshard()
        learned = trainer.sequence.held(given["labels"]) >= 0
        found[replayed] = float((output - trainer.sequence.held(drawn)).abs().where(learned, 0.0).max())
    return found[True], found[False], int(learned.sum())


def differences(layout: Layout, precision: str) -> tuple[float, float]:
    results = run_distributed(_differences, layout.world_size, run(layout, precision))
    assert sum(learned for _, _, learned in results) > 60
    return max(with_replay for with_replay, _, _ in results), max(without for _, without, _ in results)


LAYOUTS = [Layout(), Layout(tp=2, dp=2, ep=4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_replayed_log_probabilities_equal_those_of_sampling(layout: Layout) -> None:
    replayed, chosen_anew = differences(layout, "fp32")
    assert replayed <= 1e-6
    assert chosen_anew > 10 * replayed, "the routers are not near enough to ties to show anything"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_in_bf16_replay_leaves_rounding_alone(layout: Layout) -> None:
    replayed, chosen_anew = differences(layout, "bf16")
    assert chosen_anew > 3 * replayed

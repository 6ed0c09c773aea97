"""What the search calls legal is what a run accepts, from plain values to `run_layout`."""

import random
from typing import Any

import pytest
from pydantic import ValidationError

from qwen_moe.config import RunConfig, parse_config
from qwen_moe.errors import UserError
from qwen_moe.planning.hardware import Cluster, load_gpu, load_network
from qwen_moe.planning.layouts import PRECISIONS, Choice, apply, legal, legal_choices, nearest_batches
from qwen_moe.planning.search import Search
from qwen_moe.sharding.layout import run_layout
from tests.planning.recipes import random_model, values

GPUS = 16


def accepted(recipe: dict[str, Any], choice: Choice) -> bool:
    """As a run would find out: a recipe's values with the choice written in, parsed and laid out."""
    recipe = dict(recipe)
    for section, entries in choice.settings().items():
        recipe[section] = recipe.get(section, {}) | entries
    try:
        run_layout(parse_config(recipe, "test"), GPUS)
    except UserError:
        return False
    return True


def random_choice(rng: random.Random) -> Choice:
    """Degrees that may or may not fit each other, the model and the batch."""
    schedule = rng.choice(["1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
    pp, cp = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 1, 2, 4])
    return Choice(
        tp=rng.choice([1, 2, 3, 4, 8]),
        pp=pp,
        cp=cp,
        cp_kind=rng.choice(["ring", "all_gather", "ulysses"]) if cp > 1 else "auto",
        cp_ulysses=rng.choice([1, 1, 2]) if cp > 1 else 1,
        ep=rng.choice([1, 2, 4, 8]),
        etp=rng.choice([1, 1, 2, 4]),
        schedule=schedule if pp > 1 else "1f1b",
        per_rank=1 if pp == 1 or schedule == "1f1b" else rng.choice([2, 2, 3]) if schedule[0] == "i" else 2,
        micro_batch=rng.choice([1, 2, 4]),
        recompute=rng.choice(["none", "full"]),
        sharding=rng.choice(["zero2", "zero3"]),
        precision=rng.choice(["bf16", "fp8"]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_legality_is_that_of_run_layout(seed: int) -> None:
    rng = random.Random(seed)
    recipe = values(random_model(rng), 512, global_batch_size=rng.choice([24, 64]), micro_batch_size=1)
    config = parse_config(recipe, "test")
    found = {choice for choice, _ in legal_choices(config, GPUS, (1, 2, 4), least_tokens=1)}
    assert all(accepted(recipe, choice) for choice in rng.sample(sorted(found, key=str), min(40, len(found))))
    seen = {True: 0, False: 0}
    for _ in range(400):
        choice = random_choice(rng)
        seen[choice in found] += 1
        assert (choice in found) == accepted(recipe, choice), choice
    assert min(seen.values()) > 5


def test_layouts_are_those_that_the_run_has() -> None:
    config = parse_config(values(random_model(random.Random(3)), 512, global_batch_size=64), "test")
    for choice, layout in list(legal_choices(config, GPUS, least_tokens=1))[::97]:
        assert layout == run_layout(apply(config, choice), GPUS)


def test_the_nearest_legal_batches_are_the_nearest_of_all() -> None:
    """Tried one by one. Nothing but data parallelism can take a factor of 11: the model has 9 layers and 2 KV heads."""

    def with_batch(batch: int, gpus: int) -> tuple[RunConfig, bool]:
        config = parse_config(values(random_model(random.Random(3)), 512, global_batch_size=batch), "test")
        return config, next(legal_choices(config, gpus), None) is not None

    for gpus, batch in ((11, 15), (11, 3), (22, 50), (33, 34)):
        config, legal_now = with_batch(batch, gpus)
        assert not legal_now
        legal_ones = [size for size in range(1, batch + 3 * gpus) if with_batch(size, gpus)[1]]
        wanted = [max((b for b in legal_ones if b < batch), default=0), min(b for b in legal_ones if b > batch)]
        assert nearest_batches(config, gpus, PRECISIONS) == [size for size in wanted if size]
    with pytest.raises(UserError, match="--global-batch 11 or 22 would be legal"):
        Search(with_batch(15, 11)[0], 11, Cluster(load_gpu("h100-80gb"), load_network("ib400"), 11)).run(1)


def test_halves_take_turns_where_a_run_accepts_it() -> None:
    recipe = values(random_model(random.Random(3)), 512, global_batch_size=64, micro_batch_size=1)
    recipe["parallel"] = {"ep_overlap": True}
    config = parse_config(recipe, "test")
    found = [choice for choice, _ in legal_choices(config, GPUS, least_tokens=1)][::53]
    for choice in found:
        assert choice.overlaps == (choice.ep * choice.etp > 1 and choice.micro_batch > 1)
        assert accepted(recipe, choice) and apply(config, choice).parallel.ep_overlap == choice.overlaps
    assert {choice.overlaps for choice in found} == {True, False}
    assert "ep_overlap" not in Choice(ep=2, micro_batch=2).settings()["parallel"]  # a recipe that does not ask for it


def test_what_is_refused_says_why() -> None:
    config: RunConfig = parse_config(values({"preset": "turbo_style"}, 4160), "test")
    assert "is not a multiple of 2 x cp 16 x tp 4 = 128" in str(legal(config, Choice(tp=4, cp=16), 64))
    assert "Use cp_kind ring or all_gather" in str(legal(config, Choice(tp=16, cp=2, cp_kind="ulysses"), 32))
    assert "zero3" in str(legal(config, Choice(pp=2, schedule="zbv", per_rank=2, sharding="zero3"), GPUS))
    with pytest.raises(ValidationError):
        apply(config, Choice(recompute="half"))


def test_a_split_of_the_recipe_is_not_used() -> None:
    """`pipeline_split` belongs to another number of stages; a plan splits by cost."""
    recipe = values({"preset": "turbo_style"}) | {"parallel": {"pp": 2, "pipeline_split": [20, 8]}}
    layout = legal(parse_config(recipe, "test"), Choice(pp=4), GPUS)
    assert not isinstance(layout, str) and len(layout.layers) == 4


def test_settings_of_fp8_leave_fp8_only() -> None:
    recipe = values({"preset": "turbo_style"}) | {"precision": {"compute": "fp8", "fp8": {"recipe": "current"}}}
    found = {choice.precision for choice, _ in legal_choices(parse_config(recipe, "test"), 2)}
    assert found == {"fp8"}

"""Stages in a recipe: what each comes to, where it begins, its learning rates, and every mistake in one message."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_moe.config import RunConfig, dump_config, load_config, parse_config, stage_runs
from qwen_moe.errors import UserError
from qwen_moe.models.flops import flops_per_token, training_flops
from qwen_moe.training.schedule import learning_rate
from tests.small import changed, model_values

BASE: dict[str, Any] = {
    "run_dir": "run",
    "model": model_values(rope_theta=1e4, max_position_embeddings=1024),
    "data": {"train": [{"prefix": "a"}], "sequence_length": 16},
    "training": {"micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"warmup_tokens": 128, "min_learning_rate": 1e-3},
    "checkpoint": {"export_hf": False},
}
FIRST: dict[str, Any] = {"name": "first", "tokens": 640}


def recipe(*stages: Any, **changes: Any) -> RunConfig:
    return parse_config(changed(BASE, {"stages": list(stages)} | changes), "recipe")


def refused(*stages: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        recipe(*stages, **changes)
    return str(caught.value)


def second(**changes: Any) -> dict[str, Any]:
    return changed({"name": "second", "tokens": 1000}, changes)


def test_a_stage_states_its_differences_from_the_stage_before() -> None:
    config = recipe(
        FIRST,
        second(data__sequence_length=64, model__rope_theta=1e6, parallel__tp=2),
        {"name": "third", "tokens": "1e3", "data": {"train": [{"prefix": "b"}], "long_share": 0.4}},
    )
    one, two, three = stage_runs(config)
    assert [run.data.sequence_length for run in (one, two, three)] == [16, 64, 64]
    assert [run.model.rope_theta for run in (one, two, three)] == [1e4, 1e6, 1e6]
    assert [run.parallel.tp for run in (one, two, three)] == [1, 2, 2]
    assert [run.data.long_share for run in (one, two, three)] == [0, 0, 0.4]
    assert [str(run.data.train[0].prefix) for run in (one, two, three)] == ["a", "a", "b"]
    assert three.optimizer == config.optimizer and three.seed == config.seed and not three.stages
    assert config.training.train_tokens == 2640
    assert [run.data.seed for run in (one, two, three)] == [1234, 1235, 1236]
    assert stage_runs(recipe(FIRST, second(), data__seed=2**32 - 1))[1].data.seed == 0


def test_stages_begin_at_whole_steps() -> None:
    """640 tokens are 10 steps of 64; 1,000 are 3.9 of 256, so 4."""
    config = recipe(
        FIRST, second(data__sequence_length=64), {"name": "third", "tokens": 256, "training": {"global_batch_size": 2}}
    )
    places = [run.place for run in stage_runs(config)]
    assert [place.first_step for place in places] == [0, 10, 14]
    assert [place.first_tokens for place in places] == [0, 640, 640 + 4 * 256]
    assert [place.first_samples for place in places] == [0, 40, 56]
    assert config.train_steps == config.end_step == 16
    run = stage_runs(config)[1]
    assert run.tokens_before(10) == 640 and run.tokens_before(12) == 640 + 2 * 256


def test_one_stage_is_the_run_without_stages() -> None:
    plain, (staged,) = recipe(training__train_tokens=650), stage_runs(recipe(FIRST | {"tokens": 650}))
    assert stage_runs(plain) == (plain,)
    assert [learning_rate(plain, k) for k in range(11)] == [learning_rate(staged, k) for k in range(11)]
    assert plain.train_steps == staged.train_steps == 11


def test_settings_are_written_and_read_again() -> None:
    config = recipe(FIRST, second(data__sequence_length=64, schedule={"kind": "constant"}))
    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_a_schedule_spans_all_stages() -> None:
    """Warm-up over 128 of 640 + 1,000 tokens, then a cosine; steps of 64, then of 256 tokens."""
    one, two = stage_runs(recipe(FIRST, second(data__sequence_length=64)))

    def cosine(before: int) -> float:
        return 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (before - 128) / (1640 - 128)))

    assert [learning_rate(one, k) for k in range(4)] == pytest.approx([5e-3, 1e-2, 1e-2, cosine(192)], rel=1e-12)
    assert learning_rate(one, 9) == pytest.approx(cosine(576), rel=1e-12)
    assert [learning_rate(two, k) for k in (10, 13)] == pytest.approx([cosine(640), cosine(640 + 3 * 256)], rel=1e-12)


def test_a_schedule_of_its_own_begins_with_its_stage_and_spans_to_the_next() -> None:
    wsd = {"kind": "wsd", "warmup_tokens": 256, "decay_tokens": 512}
    config = recipe(
        FIRST,
        second(data__sequence_length=64, schedule=wsd, optimizer__learning_rate=4e-3),
        {"name": "third", "tokens": 1024},
        {"name": "fourth", "tokens": 512, "optimizer": {"learning_rate": 1e-3}, "schedule": {"kind": "constant"}},
    )
    runs = stage_runs(config)
    rates = [learning_rate(run, k) for run in runs for k in range(run.place.first_step, run.end_step)]
    assert len(rates) == 10 + 4 + 4 + 2
    # The recipe's cosine ends with the first stage: its last step begins at 576 of 640 tokens.
    assert rates[9] == pytest.approx(1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * 448 / 512)), rel=1e-12)
    # One step of warm-up, constant over the border into the third stage, the last two of eight steps decay.
    assert rates[10:18] == pytest.approx([4e-3] * 7 + [2e-3], rel=1e-12)
    assert rates[18:] == [1e-3, 1e-3]


def test_a_new_peak_alone_begins_the_schedule_before_it_anew() -> None:
    one, two = stage_runs(recipe(FIRST, second(optimizer__learning_rate=2e-3)))
    assert learning_rate(one, 9) < 1.5e-3
    assert [learning_rate(two, k) for k in (10, 11)] == pytest.approx([1e-3, 2e-3], rel=1e-12)


def test_the_work_of_all_stages_is_counted() -> None:
    config = recipe(FIRST, second(data__sequence_length=64))
    short, long = (flops_per_token(config.model, length).training for length in (16, 64))
    assert training_flops(config) == 640 * short + 4 * 256 * long
    assert training_flops(config, done=12) == 2 * 256 * long
    assert training_flops(recipe(training__train_tokens=640)) == 640 * short


WSD = {"kind": "wsd", "warmup_tokens": 900, "decay_tokens": 200}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"data__sequence_length": 8}, "stages.1 (second): data.sequence_length 8 is shorter than 16 of the stage before"),
    ({"data__sequence_length": 2048}, "stages.1 (second): data.sequence_length 2048 is larger than model.max_pos"),
    ({"tokens": 63}, "stages.1 (second): tokens 63 is less than one step of 64 tokens"),
    ({"schedule": {"warmup_tokens": 1000}}, "stages.1 (second): its 1000 tokens do not reach the end of its warm-up"),
    ({"optimizer__learning_rate": 1, "tokens": 128}, "do not reach the end of its warm-up, schedule.warmup_tokens 128"),
    ({"schedule": WSD}, "warmup_tokens 900 + decay_tokens 200 is more than the tokens that it spans, 1000: lower them"),
    ({"optimizer__learning_rate": 1e-4}, "stages.1 (second): schedule.min_learning_rate 0.001 is above"),
    ({"model__rope_theta": 9999}, "stages.1 (second): model.rope_theta 9999 is below 10000 of the stage before, first"),
    ({"training__micro_batch_size": 3}, "(second): training.global_batch_size 4 is not a multiple of"),
    ({"data__sequence_len": 8}, "unknown key 'stages.1.data.sequence_len'; did you mean 'sequence_length'?"),
    ({"data__split": "1,0,0"}, "unknown key 'stages.1.data.split'; valid keys: train, sequence_length, long_share"),
    ({"model__hidden_size": 8}, "unknown key 'stages.1.model.hidden_size'; valid keys: rope_theta"),
    ({"parallel__tpp": 8}, "unknown key 'stages.1.parallel.tpp'"),
    ({"precision__compute": "fp8"}, "unknown key 'stages.1.precision'"),
    ({"parallel__tp": 0}, "stages.1.parallel.tp = 0"),
    ({"parallel": {"pp": 2, "schedule": "zbv", "sharding": "zero3"}}, "stages.1 (second): parallel: schedule zbv"),
    ({"data__long_share": 1.5}, "stages.1.data.long_share = 1.5"),
    ({"tokens": "many"}, "stages.1.tokens = 'many'"),
    ({"name": "first"}, "the name 'first' is given twice"),
    ({"name": ""}, "stages.1.name = ''"),
    ({"name": "a\nb"}, "stages.1: name 'a\\nb' has spaces around it or characters that cannot be printed"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes_of_a_stage(mistake: dict[str, Any], message: str) -> None:
    said = refused(FIRST, second(**mistake))
    assert message in said and said.count("recipe: ") == 1


def test_mistakes_of_the_whole() -> None:
    said = refused(FIRST, second(), training__train_tokens=5000)
    assert "training.train_tokens 5000 is not the sum of the stages' tokens, 1640: leave it out" in said
    assert recipe(FIRST, second(), training__train_tokens=1640) == recipe(FIRST, second())
    assert "data.order_tokens 2000 is set" in refused(FIRST, second(), data__order_tokens=2000)
    assert "checkpoint.branch_from continues inside a run" in refused(FIRST, checkpoint__branch_from="elsewhere")
    assert "checkpoint.keep_steps [27] are past the last step, 26" in refused(
        FIRST, second(), checkpoint__keep_steps=[27]
    )
    assert "'stages.0.name' is missing" in refused({"tokens": 640})
    assert "'stages.0.tokens' is missing" in refused({"name": "a"})
    with pytest.raises(UserError, match="stages = 'x'"):
        parse_config(BASE | {"stages": "x"}, "recipe")
    assert "stages.0 = 3" in refused(3)


def test_overrides_name_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(changed(BASE, {"stages": [FIRST, second()]})))
    config = load_config(path, ["stages.second.tokens=2e3", "stages.second.model.rope_theta=5e4", "seed=3"])
    assert config.training.train_tokens == 2640 and stage_runs(config)[1].model.rope_theta == 5e4
    with pytest.raises(
        UserError, match=r"stages\.third\.tokens=1'?: no stage has this name; the stages are first, second"
    ):
        load_config(path, ["stages.third.tokens=1"])
    with pytest.raises(UserError, match=r"did you mean 'tokens'"):
        load_config(path, ["stages.first.token=1"])


def from_preset(**stages: Any) -> RunConfig:
    return recipe(stages=stages, model__max_position_embeddings=262144, training__micro_batch_size=1)


# arXiv 2412.15115, section 3.3, and arXiv 2501.15383, section 3: lengths, bases of RoPE, share at full length.
PUBLISHED: dict[str, list[tuple[int, float, float]]] = {
    "qwen2.5": [(4096, 1e4, 0), (32768, 1e6, 0)],
    "qwen2.5-turbo": [(32768, 1e7, 0.4), (65536, 1e7, 0.4), (131072, 1e7, 0.4), (262144, 1e7, 0.4)],
    "qwen2.5-1m": [(65536, 1e6, 0.75), (131072, 5e6, 0.75), (262144, 1e7, 0.75)],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_stages(name: str) -> None:
    runs = stage_runs(from_preset(preset=name, tokens=2e6))
    assert [(r.data.sequence_length, r.model.rope_theta, r.data.long_share) for r in runs] == PUBLISHED[name]
    assert {r.training.train_tokens for r in runs} == {2_000_000}


def test_a_preset_takes_changes_by_the_stages_names(tmp_path: Path) -> None:
    one, two = stage_runs(from_preset(preset="qwen2.5", tokens=[1e6, 2e6], **{"32k": {"data": {"long_share": 0.5}}}))
    assert (one.training.train_tokens, two.training.train_tokens) == (1_000_000, 2_000_000)
    assert two.data.long_share == 0.5 and two.data.sequence_length == 32768
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(
            changed(BASE, {"stages": {"preset": "qwen2.5", "tokens": 1e6}, "model__max_position_embeddings": 32768})
        )
    )
    config = load_config(path, ["stages.32k.training.global_batch_size=2"])
    assert stage_runs(config)[1].training.global_batch_size == 2
    for mistake, message in (
        ({"tokens": 1e6}, r"stages\.preset is 'None'; known: qwen2\.5, qwen2\.5-turbo, qwen2\.5-1m"),
        ({"preset": "qwen2.5-turb", "tokens": 1e6}, "did you mean 'qwen2.5-turbo'"),
        ({"preset": "qwen2.5"}, r"stages\.tokens is missing: the report does not give"),
        ({"preset": "qwen2.5", "tokens": [1e6]}, "has 1 number, but qwen2.5 has 2 stages"),
        ({"preset": "qwen2.5", "tokens": 1e6, "8k": {}}, r"unknown key 'stages\.8k'; qwen2\.5 has the stages 4k, 32k"),
        ({"preset": "qwen2.5", "tokens": 1e6, "4k": 3}, r"stages\.4k is 3"),
    ):
        with pytest.raises(UserError, match=message):
            from_preset(**mistake)


@pytest.mark.parametrize("name", ["long_context_demo", "turbo_style_long"])
def test_shipped_recipes_with_stages_are_right(name: str) -> None:
    runs = stage_runs(load_config(Path(name)))
    assert len(runs) > 1 and len({run.tokens_per_step for run in runs}) <= 2

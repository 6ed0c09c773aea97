"""`qwen-moe verify` and `qwen-moe info --schedule` as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.cli import main
from qwen_moe.verify import command
from qwen_moe.verify.case import Case, draw
from qwen_moe.verify.compare import sensitivity
from qwen_moe.verify.reference import train_reference
from tests.schedules import needs

DEMO = str(Path(__file__).parents[2] / "recipes" / "demo.yaml")


def test_layouts_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    needs("zbv")
    assert (
        main(["verify", DEMO, "--layout", "tp=2,ep=2", "--layout", "pp=2,schedule=zbv", "--fuzz", "1", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["equal"] and [row["ranks"] for row in facts["layouts"][:2]] == [2, 2]
    for row in facts["layouts"]:
        assert 0 < row["gradients"] <= 1e-10 and not row["wrong"]
    # The features of the recipe are kept in what is verified.
    model = facts["layouts"][0]["config"]["model"]
    assert model["family"] == "qwen2_moe" and model["shared_expert_intermediate_size"] > 0
    assert "3 of 3 layouts equal one process" in err


def test_an_objective_of_post_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Instead of the recipe's own, in the layouts given and in random ones, with settings that are drawn."""
    assert main(["verify", DEMO, "--objective", "dpo", "--layout", "cp=2", "--fuzz", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["layouts"]
    assert [row["objective"] for row in rows] == ["dpo", "dpo"] and "2 of 2 layouts equal one process" in err
    assert all(0 < row["gradients"] <= 1e-10 and row["config"]["data"]["sequence_length"] >= 16 for row in rows)


def test_a_difference_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_moe.verify import reference

    monkeypatch.setattr(reference, "learning_rate", lambda config, step: 0.5)
    assert main(["verify", DEMO, "--layout", "ep=2"]) == 1
    out = capsys.readouterr().out
    assert "NOT EQUAL" in out and "0 of 1 layout equal one process; not equal: ep=2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to verify"),
        (["--layout", "tp=two"], "'tp=two' is not AXIS=NUMBER"),
        (["--layout", "ep=3,dp=2"], "tp 1 x cp 1 x dp 2 = 2 ranks are not a multiple of ep 3 x etp 1 = 3"),
        (["--layout", "tp=16"], "needs 16 processes but --max-ranks is 8"),
        (
            ["--layout", "cp=4,cp_ulysses=2"],
            "cp_ulysses 2 with cp_kind auto: it says how many ranks exchange heads inside a ring or all-gather",
        ),
        (["--fuzz", "-1"], "--fuzz: '-1'"),
        (["--max-ranks", "1", "--fuzz", "1"], "--max-ranks: '1'"),
        (["--shapes", "64", "--fuzz", "1"], "leave --layout and --fuzz out"),
        (["--shapes", "3", "parallel.pp=2"], "3 processes are not a multiple of tp 1 x cp 1 x pp 2 = 2"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", DEMO, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_shapes_of_the_recipe_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["verify", DEMO, "--shapes", "8", "parallel.tp=2", "parallel.pp=2", "training.global_batch_size=16"]) == 0
    )
    assert "rank      7 of 8 (tp=2,dp=2,pp=2)" in capsys.readouterr().out


def test_a_schedule_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "pictures" / "s.png"
    arguments = ["info", "--schedule", "1f1b", "--pp", "4", "--micro-batches", "8", "--output", str(picture), "--json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["idle_share"] == pytest.approx(3 / 11) and facts["peak_activations_per_rank"] == [4, 3, 2, 1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_schedule_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["info", DEMO, "--schedule", "zbv", "--pp", "2", "--micro-batches", "4"]
    assert main([*arguments, "--output", str(tmp_path / "s.png")]) == 0
    assert "layers by stage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "2f2b", "--pp", "2", "--micro-batches", "4"], "is not one of 1f1b"),
        (["--schedule", "1f1b", "--micro-batches", "4"], "at least 2 ranks"),
        (["--schedule", "1f1b", "--pp", "4", "--micro-batches", "2"], "at least 4 micro-batches"),
        (["turbo_style", "--schedule", "1f1b"], "reads a recipe.yaml"),
        ([], "give a preset"),
    ],
)
def test_bad_schedules(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_recipes_own_pipeline_split_is_what_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    split = ["model.num_hidden_layers=6", "parallel.pp=2", "parallel.pipeline_split=[5,1]"]
    assert main(["verify", DEMO, *split, "--layout", "pp=2", "--layout", "pp=3", "--json"]) == 0
    out, err = capsys.readouterr()
    same, other = (row["config"] for row in json.loads(out)["layouts"])
    assert same["parallel"]["pipeline_split"] == [5, 1] and same["model"]["num_hidden_layers"] == 6
    assert other["parallel"]["pipeline_split"] == [] and other["model"]["num_hidden_layers"] == 4
    assert err.count("note: ") == 1
    assert "note: pp=3: parallel.pipeline_split [5, 1] has 2 stages and this layout has 3: a split" in err


def test_a_pipeline_split_of_another_number_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", DEMO, "model.num_hidden_layers=6", "parallel.pipeline_split=[5,2]", "--layout", "pp=2"]) == 2
    assert "parallel.pipeline_split [5, 2] has 7 layers but model.num_hidden_layers is 6" in capsys.readouterr().err


def test_weights_that_magnify_rounding_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep and narrow model may turn the last digit of its weights into more than the limit, in one process too. Other
    weights decide then; a layout that differs with all of them is not equal."""
    seeds = []

    def compare_once(name: str, case: Case) -> tuple[dict[str, Any], str, float | None]:
        seeds.append(case.config.seed)
        worst = len(seeds) < enough
        return {"equal": not worst}, "line", 3e-10 if worst else None

    monkeypatch.setattr(command, "_compare_once", compare_once)
    case = draw(4242, 56, 8)
    for enough, equal in ((1, True), (3, True), (9, False)):
        seeds.clear()
        row, text = command._compare("#56", case)
        assert row["equal"] == equal and len(seeds) == min(enough, 4) == len(set(seeds))
        assert ("weights drawn again" in text) == (enough > 1)


def test_the_last_digit_of_the_weights_tells_how_sensitive_a_case_is() -> None:
    found = []
    for index in (45, 55):  # eight layers of hidden size 16, and two
        config, layout, probe = draw(4242, index, 8)
        runs = (train_reference(config, layout.dp, 3, probe, nudged=nudged) for nudged in (False, True))
        found.append(sensitivity(*runs))
    assert found[0] > 1e-11 and 0 < found[1] < 1e-12

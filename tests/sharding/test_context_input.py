"""What context parallelism cannot do is refused through the command line, by one message, before anything starts."""

from pathlib import Path

import pytest

from qwen_moe.cli import main
from tests.training.test_run import write_recipe

# Overrides of a recipe with 32 tokens a sequence, 4 heads and 2 KV heads; the message.
REFUSED = [
    (["cp=0"], "parallel.cp = 0: Input should be greater than 0"),
    (["cp=3"], "data.sequence_length 32 is not a multiple of 2 x cp 3 x tp 1 = 6: use 30 or 36, or lower a degree"),
    (["cp=4", "tp=8"], "data.sequence_length 32 is not a multiple of 2 x cp 4 x tp 8 = 64: use 64, or lower a degree"),
    (["cp=8", "cp_kind=ulysses"], "an exchange of heads over 8 ranks (cp_kind ulysses): with tp 1 a rank has 4 of"),
    (["cp=2", "tp=4", "cp_kind=ulysses"], "with tp 4 a rank has 1 of model.num_attention_heads and 1 of num_key_value"),
    (["cp=16", "cp_kind=ring", "cp_ulysses=8"], "over 8 ranks (cp_ulysses 8): with tp 1 a rank has 4 of"),
    (["cp=4", "cp_kind=ring", "cp_ulysses=3"], "cp_ulysses 3 does not divide cp 4: use 2, or leave it out"),
    (["cp=2", "cp_kind=ring", "cp_ulysses=2"], "cp_ulysses 2 is all of cp 2: for heads alone, set cp_kind to ulysses"),
    (["cp=4", "cp_ulysses=2"], "cp_ulysses 2 with cp_kind auto: it says how many ranks exchange heads"),
    (["cp_kind=ring", "cp_ulysses=2"], "cp_ulysses 2 does not divide cp 1: leave it out"),
    (
        ["cp=2", "cp_kind=rings"],
        "parallel.cp_kind = 'rings': Input should be 'auto', 'ring', 'all_gather' or 'ulysses'",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=str)
def test_a_run_is_refused(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "no corpus")  # not even the data is looked at
    assert main(["train", str(recipe), *(f"parallel.{item}" for item in overrides)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "parallel: parallel" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "cp=4,cp_kind=ring,cp_ulysses=3"], "cp_ulysses 3 does not divide cp 4: use 2"),
        (["--layout", "cp=0"], "'cp=0' is not AXIS=NUMBER"),
        (["--layout", "cp=16"], "needs 16 processes but --max-ranks is 8"),
        (["--shapes", "2", "parallel.cp=4"], "2 processes are not a multiple of tp 1 x cp 4 x pp 1 = 4: start 4"),
    ],
)
def test_verify_refuses(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "no corpus")
    assert main(["verify", str(recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_verify_says_what_the_recipe_itself_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is shrunk to one that the layout splits, so the recipe's own may not."""
    recipe = write_recipe(tmp_path, tmp_path / "no corpus", data__sequence_length=48)
    assert main(["verify", str(recipe), "--layout", "cp=3,cp_kind=ulysses"]) == 0
    error = capsys.readouterr().err
    assert "note: the recipe itself cannot run with cp=3,cp_kind=ulysses: an exchange of heads over 3 ranks" in error


@pytest.mark.parametrize(("heads", "kv_heads", "chosen"), [(4, 4, "ulysses"), (6, 1, "all_gather")])
def test_verify_takes_the_kind_that_auto_takes_for_the_recipe(
    heads: int, kv_heads: int, chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A smaller model has other numbers of heads, for which `auto` might choose another kind."""
    recipe = write_recipe(tmp_path, tmp_path / "no corpus", model__num_attention_heads=heads)
    model = ["model.head_dim=8", f"model.num_key_value_heads={kv_heads}"]
    assert main(["verify", str(recipe), *model, "--layout", "cp=4"]) == 0
    assert f"cp=4 {chosen}" in capsys.readouterr().out

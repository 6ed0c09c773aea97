"""`qwen-moe plan` as a user meets it."""

import json
import tomllib
from pathlib import Path

import pytest
import yaml

import qwen_moe.planning
from qwen_moe.cli import main
from qwen_moe.config import load_config
from qwen_moe.errors import UserError
from qwen_moe.planning.hardware import Cluster, known, load_gpu, load_network
from qwen_moe.planning.layouts import legal_choices
from qwen_moe.planning.memory import MemoryModel
from qwen_moe.planning.recipe_edit import edit_recipe
from qwen_moe.planning.search import Search, changes
from qwen_moe.sharding.layout import run_layout
from tests.planning import recipes

RECIPE = """\
# A model for the test.
run_dir: runs/test
model:
  preset: demo
  num_hidden_layers: 4      # fewer
data:
  train:
    - prefix: data/tokens
  sequence_length: 512
training:
  train_tokens: 1.0e+9      # a billion
  micro_batch_size: 1       # sequences
  global_batch_size: 64
optimizer: {learning_rate: 1.0e-3}

# Layout
parallel:
  tp: 1  # tensor
  # experts:
  ep: 2

precision:
  compute: bf16
"""
# A GPU that is too small for most layouts of the demo.
TINY = """\
name: tiny
memory_gib: 0.22
reserved_gib: 0.0
peak_tflops: {bf16: 100}
memory_gb_per_second: 1000
nvlink_gb_per_second: 100
price_per_gpu_hour: 2.0
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def plan(*arguments: object) -> int:
    return main(["plan", *map(str, arguments)])


def test_the_table_and_the_json_say_the_same(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe, "--gpus", 8, "--top", 2, "--price", 3) == 0
    text = capsys.readouterr().out
    assert plan(recipe, "--gpus", 8, "--top", 2, "--price", 3, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["best"]) == 2 and f"{facts['legal_layouts']:,} legal layouts" in text
    first = facts["best"][0]
    assert f"{first['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU" in text
    assert first["gpu_hours"] == pytest.approx(1e9 / first["tokens_per_second_per_gpu"] / 3600)
    assert first["cost"] == pytest.approx(3 * first["gpu_hours"])
    peak = facts["gpu"]["peak_tflops"]
    assert plan(recipe, "--gpus", 8, "--top", 1, "--precision", "fp8", "--json") == 0
    for scored in (first, *json.loads(capsys.readouterr().out)["best"]):
        assert scored["mfu"] == pytest.approx(scored["tflops_per_gpu"] / peak[scored["precision"]])
    assert first["step_seconds"]["total"] == pytest.approx(
        sum(seconds for part, seconds in first["step_seconds"].items() if part != "total")
    )
    assert first["step_seconds"]["total"] <= facts["best"][1]["step_seconds"]["total"]


def test_a_batch_that_the_recipes_micro_batch_does_not_divide(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace("micro_batch_size: 1", "micro_batch_size: 4"))
    assert load_config(recipe).training.micro_batch_size == 4
    assert plan(recipe, "--gpus", 2, "--global-batch", 6, "--top", 50, "--json", "--write") == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert {scored["micro_batch"] for scored in best} <= {1, 2, 3} and best
    training = load_config(recipe).training
    assert (training.global_batch_size, training.micro_batch_size) == (6, best[0]["micro_batch"])


def test_the_best_layout_is_traced(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = (recipe, "--gpus", 2, "training.global_batch_size=2", "model.num_hidden_layers=2")
    assert plan(*small, "--precision", "bf16", "--trace", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    best = facts["best"][0]
    settings = [f"parallel.{name}={best[name]}" for name in ("tp", "pp", "ep", "etp", "schedule", "sharding")]
    settings += [f"training.micro_batch_size={best['micro_batch']}", f"training.recompute={best['recompute']}"]
    assert main(["trace", *map(str, small), *settings, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts["trace"]
    assert plan(*small, "--precision", "bf16", "--trace") == 0
    text = capsys.readouterr().out
    assert "\n1. " in text and f"{facts['trace']['total']['launches']:,} launches" in text


def test_what_cannot_be_traced_is_refused_before_the_search(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace("run_dir:", "objective: {kind: dpo}\nrun_dir:"))
    assert plan(recipe, "--gpus", 8, "--trace") == 2
    said = capsys.readouterr()
    assert "objective.kind dpo reads" in said.err and not said.out, said.err


def test_what_is_written_keeps_comments_and_runs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe, "--gpus", 8, "--gpu", "h100-80gb", "--global-batch", 32, "--write") == 0
    said, text = capsys.readouterr().out, recipe.read_text()
    assert "training.global_batch_size 64 -> 32" in said
    for comment in (
        "# A model for the test.",
        "# fewer",
        "# a billion",
        "# sequences",
        "# Layout",
        "# tensor",
        "# experts:",
    ):
        assert comment in text
    config = load_config(recipe)
    assert run_layout(config, 8) and config.training.global_batch_size == 32
    assert text.index("parallel:") < text.index("schedule:") < text.index("precision:")
    assert plan(recipe, "--gpus", 8, "--write") == 0
    assert "unchanged" in capsys.readouterr().out and recipe.read_text() == text


def test_editing_is_exact_or_starts_anew() -> None:
    settings = {"parallel": {"tp": 2, "schedule": "zbv"}, "training": {"recompute": "full"}}
    for text in (RECIPE, RECIPE.replace("parallel:\n  tp: 1  # tensor\n  # experts:\n  ep: 2\n", ""), "run_dir: x"):
        edited, kept = edit_recipe(text, settings)
        assert kept
        expected = yaml.safe_load(text)
        for section, entries in settings.items():
            expected[section] = expected.get(section, {}) | entries
        assert yaml.safe_load(edited) == expected
    edited, kept = edit_recipe("parallel: {tp: 1, ep: 2}  # flow\n", settings)
    assert kept and "# flow" in edited
    assert yaml.safe_load(edited)["parallel"] == {"tp": 2, "ep": 2, "schedule": "zbv"}
    edited, kept = edit_recipe("parallel: {tp: 1,\n  ep: 2}\n", settings)
    assert not kept and yaml.safe_load(edited)["parallel"] == {"tp": 2, "ep": 2, "schedule": "zbv"}


def test_overrides_may_stand_anywhere(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe, "data.sequence_length=256", "--gpus", 8, "training.global_batch_size=16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 8, "--gpu", "h100-80g"), "did you mean 'h100-80gb'?"),
        (("--gpus", 8, "--network", "token-ring"), "known: "),
        (("--gpus", 12), "not a multiple of --gpus-per-node 8"),
        (("--gpus", 0), "argument --gpus: '0': expected a whole number, 1 or more"),
        (("--gpus", 8, "--imbalance", "nan"), "argument --imbalance: 'nan': expected a number, 1 or more"),
        (("--gpus", 8, "--imbalance", "inf"), "argument --imbalance: 'inf': expected a number"),
        (("--gpus", 8, "--price", "-1"), "argument --price: '-1': expected a number, 0 or more"),
        (("--gpus", 8, "--imbalance", 1e9), "--imbalance 1e.09: expected . at most, num_experts "),
        (("--gpus", 8, "--price", "1e300"), "argument --price: '1e300': expected a number, 0 or more and at most"),
        (
            ("--gpus", 8, "model.hidden_size=60", "model.head_dim=16"),
            "hidden_size 60 is not a multiple of 8, .* 64 can be",
        ),
        (("--gpus", 8, "model.moe_intermediate_size=33"), "moe_intermediate_size 33 is not a multiple of 8, .* 32 can"),
        (("--gpus", 8, "--price", "1e999"), "argument --price: '1e999': expected a number"),
        (("--gpus", "9" * 400), r"argument --gpus: '9{60}'... .400 characters.: expected a whole number"),
        (
            ("--gpus", 8, "training.micro_batch_size=1", "training.micro_batch_size=2"),
            "training.micro_batch_size is given twice",
        ),
        (
            ("--gpus", 8, "--global-batch", 8, "training.global_batch_size=16"),
            "training.global_batch_size is given twice",
        ),
        (("--gpus", 8, "--imbalance", 0.5), "'0.5': expected a number, 1 or more"),
        ((), "give a recipe and --gpus N"),
        (("--gpus", 8, "--precision", "fp8", "--gpu", "a100-80gb"), "A100.* does not compute in fp8: .* of bf16"),
        (("--gpus", 8, "--gpu", "missing.yaml"), "does not exist"),
        (("--gpus", 7, "--gpus-per-node", 7), "no layout"),
        (
            ("--gpus", 8, "data.prepare.text_key=x", "--write"),
            "there is nothing to read|cannot write override|is missing",
        ),
    ],
)
def test_mistakes_are_explained(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    import re

    assert plan(recipe, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_gpu_of_ones_own(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a file, by name in the user's folder, and with a mistake in it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    assert load_gpu(str(path)).name == "tiny"
    folder = tmp_path / "config" / "qwen-moe" / "hardware" / "gpus"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(TINY)
    assert load_gpu("mine").memory_gib == 0.22
    path.write_text(TINY.replace("peak_tflops", "peak"))
    assert plan(recipe, "--gpus", 8, "--gpu", path) == 2
    error = capsys.readouterr().err
    assert "peak_tflops: Field required" in error and "peak: Extra inputs" in error


H100 = {"name": "x", "memory_gib": 80, "reserved_gib": 4, "peak_tflops": {"bf16": 989.0}, "memory_gb_per_second": 3350,
        "nvlink_gb_per_second": 450}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gib": float("nan")}, "memory_gib: Input should be greater than 0"),
        ({"memory_gib": True}, "memory_gib: true is not a number"),
        ({"memory_gb_per_second": float("inf")}, "memory_gb_per_second: Input should be a finite number"),
        ({"reserved_gib": 80}, "reserved_gib 80 leaves nothing of memory_gib 80"),
        ({"peak_tflops": {"fp8": 1.0}}, "peak_tflops has fp8: give bf16"),
        ({"peak_tflops": {"bf16": 1.0, "bf-16": 2.0}}, "peak_tflops has bf-16, bf16: give bf16"),
        ({"efficiency": {"gemm": 74}}, "efficiency.gemm: Input should be less than or equal to 1, found 74"),
        ({"memory_gib": 80995}, "memory_gib 80995 is not in GiB: expected 0 to 4096"),
        ({"peak_tflops": {"bf16": 0.989}}, "peak_tflops.bf16 0.989 is not in 10^12 FLOPs per second"),
        ({"peak_tflops": {"bf16": 989.0, "fp8": 1.979e15}}, "peak_tflops.fp8 1.979e+15 is not in"),
        ({"memory_gb_per_second": 3.35}, "memory_gb_per_second 3.35 is not in GB (10^9 bytes) per second: expected 20"),
        ({"nvlink_gb_per_second": 0.45}, "nvlink_gb_per_second 0.45 is not in GB"),
        ({"nvlink_gb_per_second": 450e9}, "nvlink_gb_per_second 4.5e+11 is not in GB"),
        ({"nvlink_latency_us": 8e-6}, "nvlink_latency_us 8e-06 is not in microseconds"),
        ({"price_per_gpu_hour": -1}, "price_per_gpu_hour: Input should be greater than or equal to 0, found -1"),
    ],
)
def test_a_gpu_that_is_none(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump(H100 | changes))
    with pytest.raises(UserError) as error:
        load_gpu(str(path))
    assert message in str(error.value)
    path.write_text(yaml.safe_dump(H100) + "name: y\n")
    with pytest.raises(UserError, match="'name' is given twice, in lines"):
        load_gpu(str(path))
    assert load_gpu(" H100-80GB ") == load_gpu("h100-80gb")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gb_per_second": 400}, "gb_per_second 400 is not in GB .*: 50 for 400 Gbit/s: expected 0.01 to 250"),
        ({"gb_per_second": 50e9}, "gb_per_second 5e.10 is not in GB"),
        ({"latency_us": 15e-6}, "latency_us 1.5e-05 is not in microseconds"),
    ],
)
def test_a_network_in_other_units_is_refused(changes: dict[str, float], message: str, tmp_path: Path) -> None:
    path = tmp_path / "network.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "gb_per_second": 50, "latency_us": 15} | changes))
    with pytest.raises(UserError, match=message):
        load_network(str(path))


def test_what_does_not_fit_is_named_with_what_would(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    config, gpu = load_config(recipe), load_gpu(str(path))
    found = Search(config, 8, Cluster(gpu, load_network("ib400"), 8)).run(3)
    assert found.best and found.misfits
    for scored in found.best:
        assert scored.memory.total <= gpu.usable_bytes
    for misfit in found.misfits:
        assert misfit.scored.memory.total > gpu.usable_bytes
        assert misfit.scored.step.total <= found.best[0].step.total
        assert misfit.nearest is not None and misfit.nearest.memory.total <= gpu.usable_bytes
        assert 1 <= len(changes(misfit.scored.choice, misfit.nearest.choice)) <= 4


@pytest.mark.slow
def test_the_best_is_the_best_of_all(recipe: Path, tmp_path: Path) -> None:
    """Against scoring every layout with its memory, on GPUs that just hold a layout and that just do not."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    config, gpu, network = load_config(recipe), load_gpu(str(path)), load_network("ib400")  # a GPU without FP8
    memory, times = MemoryModel(config), Search(config, 4, Cluster(gpu, network, 8)).time
    scored = [
        (memory.fullest(choice, layout).total, times.step(choice, layout).total)
        for choice, layout in legal_choices(config, 4, wanted=("bf16",))
    ]
    fastest, leanest = min(scored, key=lambda one: one[1]), min(scored)
    for size in (gpu.usable_bytes, 1.000001 * fastest[0], 0.999999 * fastest[0], 1.000001 * leanest[0]):
        limited = gpu.model_copy(update={"memory_gib": size / 2**30})
        expected = min(seconds for held, seconds in scored if held <= limited.usable_bytes)
        assert Search(config, 4, Cluster(limited, network, 8)).run(1).best[0].step.total == expected


def test_slices_of_experts_too_thin_to_count_are_left_out() -> None:
    """1408 / 32 = 44 features are legal, but not a multiple of the 16 bytes that grouped GEMMs need."""
    config = recipes.turbo_style(global_batch_size=64)
    assert any(choice.etp == 32 for choice, _ in legal_choices(config, 32))
    search = Search(config, 32, Cluster(load_gpu("h100-80gb"), load_network("ib400"), 8), precisions=("bf16",))
    assert all(scored.choice.etp < 32 for scored in search.run(1).best)


def test_nothing_fits(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("0.22", "0.0625"))
    before = recipe.read_text()
    assert plan(recipe, "--gpus", 1, "--gpu", path) == 0
    assert "nothing fits; " in capsys.readouterr().out
    assert plan(recipe, "--gpus", 1, "--gpu", path, "--write") == 2
    assert "nothing was written" in capsys.readouterr().err and recipe.read_text() == before


def test_more_gpus_are_whole_nodes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number of GPUs that `plan` proposes is one that it takes: twice 3 would do, and is no whole nodes of 4."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("0.22", "0.1"))
    facts = {}
    for node in (3, 4):
        assert plan(recipe, "--gpus", 3, "--gpu", path, "--gpus-per-node", node, "--json") == 0
        facts[node] = json.loads(capsys.readouterr().out)
    assert not facts[4]["best"] and (facts[3]["gpus_needed"], facts[4]["gpus_needed"]) == (6, 12)


def test_a_margin_of_memory_stays_free(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    usable = load_gpu(str(path)).usable_bytes
    command = (recipe, "--gpus", 4, "--gpu", path, "--top", 1, "--json")
    assert plan(*command) == 0
    first = json.loads(capsys.readouterr().out)["best"][0]
    needed = first["memory_bytes"]["total"]
    assert plan(*command, "--margin", 1 - 0.99 * needed / usable) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["usable_bytes"] == pytest.approx(0.99 * needed)
    assert facts["best"][0]["memory_bytes"]["total"] <= 0.99 * needed
    assert facts["best"][0]["step_seconds"]["total"] >= first["step_seconds"]["total"]


def test_every_data_file_is_installed() -> None:
    """The patterns of pyproject.toml take what the package reads; every file loads."""
    root = Path(qwen_moe.planning.__file__).parents[1]
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["qwen_moe"]
    installed = {path for pattern in patterns for path in root.glob(pattern)}
    recipes = (root / "recipes").glob("*.yaml")  # a link, which rglob does not follow
    assert installed == {*root.rglob("*.yaml"), *recipes}
    for name in known("gpus"):
        load_gpu(name)
    for name in known("networks"):
        load_network(name)


def test_the_check_of_published_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """And docs/plan-time.md shows what it prints."""
    assert plan("--check-published") == 0
    printed = capsys.readouterr().out
    assert "held out" in printed
    page = Path(__file__).parents[2] / "docs" / "plan-time.md"
    assert printed.strip() in page.read_text(encoding="utf-8")


STAGES = """
stages:
  - {name: short, tokens: 1.0e+9}
  - {name: long, tokens: 1.0e+9, data: {sequence_length: 1024}}
"""


def test_a_stage_is_planned_by_its_name(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace("  train_tokens: 1.0e+9      # a billion\n", "") + STAGES)
    plan = ["plan", str(recipe), "--gpus", "2", "--top", "1", "--precision", "bf16"]
    assert main(plan) == 0
    found = capsys.readouterr()
    assert "this is long, with the longest sequences, of 1,024 tokens" in found.err and "64 x 1,024 tokens" in found.out
    assert main([*plan, "--stage", "short"]) == 0
    assert "64 x 512 tokens" in capsys.readouterr().out
    assert main([*plan, "--stage", "middle"]) == 2
    assert "there is no stage 'middle': its stages are short, long" in capsys.readouterr().err

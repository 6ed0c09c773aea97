"""Predicting a run's end: against curves computed step by step from the published formulas, and a run directory."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_moe.cli import main
from qwen_moe.config import load_config
from qwen_moe.training.schedule import learning_rate
from scaling_laws.curves import Curve, predict_final_loss

STEPS = 4000
DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def schedule(kind: str, steps: int = STEPS, peak: float = 3e-4, floor: float = 0.1) -> np.ndarray:
    step = np.arange(steps)
    warm = steps // 50
    if kind == "cosine":
        done = np.clip((step - warm) / (steps - warm), 0, 1)
        shape = floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * done))
    else:
        start = int(0.8 * steps)
        shape = 1 - (1 - floor) * np.clip((step - start) / (steps - start), 0, 1)
    return peak * np.where(step < warm, (step + 1) / warm, shape)


def published(law: str, rate: np.ndarray) -> np.ndarray:
    """Written as the papers write it, over every pair of steps: multi_power with the fit for 100M parameters of
    arXiv 2503.12811, tissue (arXiv 2408.11029) with lambda 0.995 and a like drop."""
    s1 = np.cumsum(rate)
    warm = int(np.argmax(rate >= 0.999 * rate.max()))
    fall = np.concatenate([[0.0], rate[:-1] - rate[1:]])
    fall[: warm + 1] = 0
    power = 2.651 + 0.601 * s1**-0.453
    drop = np.zeros_like(rate)
    for t in range(len(rate)):
        k = np.flatnonzero(fall[: t + 1])
        if law == "multi_power":
            since = s1[t] - s1[k] + rate[k]
            drop[t] = np.sum(438 * fall[k] * (1 - (2.132 * rate[k] ** -0.655 * since + 1) ** -0.598))
        else:
            # S2 = sum over i of the momentum m_i = lambda m_(i-1) + fall_i, so each fall counts (1 - lambda^n)/(1 - lambda).
            drop[t] = 2.2 * np.sum(fall[k] * (1 - 0.995 ** (t - k + 1)) / (1 - 0.995))
    return power - drop


@pytest.mark.parametrize("law", ["tissue", "multi_power"])
@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_end_lies_in_the_interval_and_the_interval_narrows(law: str, kind: str) -> None:
    rate = schedule(kind)
    truth = published(law, rate)
    seen = truth + np.random.default_rng(1).normal(0, 0.04, STEPS)
    widths = []
    for share in (0.3, 0.6, 0.97):
        found = predict_final_loss(Curve(name="run", learning_rate=rate, loss=seen[: int(share * STEPS)]))
        assert found.low < truth[-1] < found.high
        assert found.final == pytest.approx(truth[-1], rel=0.025 if share < 0.9 else 0.006)
        widths.append(found.high - found.low)
        assert found.backtest is not None and abs(found.backtest) < 0.015
    assert widths[2] < 0.4 * widths[0]


def test_spikes_are_no_part_of_the_trend() -> None:
    rate = schedule("cosine")
    rng = np.random.default_rng(4)
    seen = (published("tissue", rate) + rng.normal(0, 0.04, STEPS))[: STEPS // 2]
    spiky = seen.copy()
    spiky[rng.choice(len(seen), 100, replace=False)] += 20.0
    calm, disturbed = (predict_final_loss(Curve(name="run", learning_rate=rate, loss=loss)) for loss in (seen, spiky))
    assert disturbed.final == pytest.approx(calm.final, rel=0.03)  # spikes as they are make it a quarter higher


def test_finished_runs_teach_what_the_fall_brings() -> None:
    """A WSD run before its decay: a finished run with the same law, of another schedule and half the length."""
    rate = schedule("wsd")
    truth = published("tissue", rate) - 0.0
    rng = np.random.default_rng(2)
    seen = (truth + rng.normal(0, 0.04, STEPS))[: STEPS // 2]
    shorter = schedule("wsd", STEPS // 2)
    finished = published("tissue", shorter) + rng.normal(0, 0.04, STEPS // 2)
    curve = Curve(name="run", learning_rate=rate, loss=seen)
    alone = predict_final_loss(curve)
    taught = predict_final_loss(curve, [Curve(name="done", learning_rate=shorter, loss=finished)])
    assert taught.high - taught.low < 0.7 * (alone.high - alone.low)
    assert taught.low < truth[-1] < taught.high


def run_directory(folder: Path, height: float, share: float) -> Path:
    """A run of the demo's recipe whose losses are written by hand."""
    folder.mkdir()
    text = DEMO.read_text().replace("train_tokens: 655_360", "train_tokens: 2_048_000")
    (folder / "config.yaml").write_text(text)
    config = load_config(folder / "config.yaml")
    steps = config.train_steps
    rates = np.array([learning_rate(config, step) for step in range(steps)])
    loss = 2.0 + height * (np.cumsum(rates / rates.max()) / 100) ** -0.5
    loss += np.random.default_rng(0).normal(0, 0.02, steps)
    records = [{"step": step + 1, "loss": float(loss[step])} for step in range(int(share * steps))]
    records.insert(40, {"step": 40, "validation_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_runs_of_one_group_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_directory(tmp_path / "good", 1.0, 0.7)
    bad = run_directory(tmp_path / "bad", 3.0, 0.4)
    assert main(["scaling", "predict", str(good), str(bad), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert not first["hopeless"] and second["hopeless"]
    assert first["interval"][0] < first["predicted_loss"] < first["interval"][1]
    assert main(["scaling", "predict", str(good), "--hopeless-above", "1.5"]) == 0
    assert "hopeless" in capsys.readouterr().out


def test_a_csv_of_another_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = schedule("cosine")
    truth = published("multi_power", rate)
    path = tmp_path / "curve.csv"
    rows = [f"{t},{rate[t]},{truth[t] if t < 2500 else ''}" for t in range(STEPS)]
    path.write_text("step,learning_rate,loss\n" + "\n".join(rows) + "\n")
    assert main(["scaling", "predict", str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["done"] == pytest.approx(0.625) and found["predicted_loss"] == pytest.approx(truth[-1], rel=0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step,loss\n1,2\n", "has no column learning_rate"),
        ("step,learning_rate,loss\n1,fast,2\n", "curve.csv:2: expected numbers"),
        ("step,learning_rate,loss\n1,1e-3,inf\n", "curve.csv:2: expected numbers"),
        ("step,learning_rate,loss\n1,1e-3,2\n1,1e-3,3\n", "curve.csv:3: step 1 comes after step 1"),
        ("step,lr,loss\n1,1e-3,2\n", "has no column learning_rate: expected step, learning_rate, loss; rename 'lr' to"),
        (
            "step,learning_rate,loss\n1,1e-3,2\n2,1e-3,2\n12,1e-3,2\n",
            "curve.csv:4: step 12 comes after step 2, and the first",
        ),
        ("step,learning_rate,loss\n501,1e-3,2\n502,1e-3,2\n", "its rows begin at step 501: give those before, too"),
        ("step,learning_rate,loss\n" + "".join(f"{t},1e-3,2e9\n" for t in range(50)), "the median loss is 2e+09"),
        ("step,learning_rate,loss\n" + "".join(f"{t},1e-3,2e-9\n" for t in range(50)), "the median loss is 2e-09"),
        ("step,loss,learning_rate,loss\n1,1,1e-3,2\n", "the column loss is given twice (columns 2 and 4)"),
        ("step;learning_rate;loss\n1;0,001;2\n", "separated by semicolons"),
        ("step,learning_rate,loss\n1,1e-3,2,1\n", "curve.csv:2: the row has 4 cells and the header 3 columns"),
        (
            "step,learning_rate,loss\n" + "".join(f"{t},1e-3,2\n" for t in range(12)),
            "12 losses in 100.0% of the run are too few",
        ),
        ("step,learning_rate,loss\n" + "".join(f"{t},1e-3,-2\n" for t in range(50)), "a loss is -2"),
    ],
)
def test_bad_curves(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curve.csv"
    path.write_text(content)
    assert main(["scaling", "predict", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "predict", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["scaling", "predict", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
    run = run_directory(tmp_path / "run", 1.0, 0.5)
    assert main(["scaling", "predict", str(run), "--like", str(run)]) == 2
    assert "has done 50% of its steps: give finished runs" in capsys.readouterr().err


def test_a_run_that_blew_up_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A robust fit takes the newest losses for outliers, and would predict that the run ends well."""
    rate = schedule("cosine")
    truth = published("multi_power", rate) + np.random.default_rng(0).normal(0, 0.02, STEPS)
    paths = []
    for name, height in (("calm", 0.0), ("blown", 8.0)):
        loss = truth + height * (np.arange(STEPS) > 2000)
        paths.append(tmp_path / f"{name}.csv")
        rows = [f"{t},{rate[t]},{loss[t] if t < 2500 else ''}" for t in range(STEPS)]
        paths[-1].write_text("step,learning_rate,loss\n" + "\n".join(rows) + "\n")
    assert main(["scaling", "predict", *map(str, paths), "--json"]) == 0
    assert [row["blew_up"] for row in json.loads(capsys.readouterr().out)] == [False, True]
    assert main(["scaling", "predict", *map(str, paths)]) == 0
    assert capsys.readouterr().out.count("blew up") == 2  # the run, and what it means
    rows = [f"{t},{rate[t]},{truth[t]}" for t in range(2500)]  # the past alone
    paths[0].write_text("step,learning_rate,loss\n" + "\n".join(rows) + "\n")
    assert main(["scaling", "predict", str(paths[0])]) == 0
    assert "counts as finished: of a run that goes on, give the learning rates" in capsys.readouterr().out

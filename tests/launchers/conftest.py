"""A Slurm cluster for the tests of this folder, one for the session, and what runs on it."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_moe.cli import main
from tests.launchers.launched import Launched, write_recipe, write_site
from tests.launchers.slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    problem = why_not()
    if problem:
        pytest.skip(f"no Slurm to test with: {problem}")
    # Sockets' paths are short, so is this folder's.
    started = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    started.start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def slurm(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster with an empty queue, its commands on PATH."""
    cluster.clear()
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["router", "expert", "token", "gradient", "tensor", "pipeline", "batch", "loss"]
    documents = [" ".join(rng.choices(words, k=200)) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    arguments = ["--input", str(folder / "text.jsonl"), "--output", str(folder / "tokens")]
    assert main(["data", "prepare", *arguments, "--train-tokenizer", "--vocab-size", "300", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site(tmp_path_factory.mktemp("site") / "slurm.toml")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Launched:
    """The long recipe, run by `qwen-moe train` in two processes on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder, corpus, steps=150)
    assert main(["train", str(recipe), "launch.nproc=2"]) == 0
    return Launched(folder / "run")

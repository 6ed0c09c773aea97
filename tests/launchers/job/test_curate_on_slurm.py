"""`qwen-moe data curate` on a real Slurm: arrays of the library's tasks, the same files as on one machine."""

from pathlib import Path

import pytest

from tests.curation.curations import curate, outputs, recipe, write_corpus
from tests.launchers.slurm_cluster import SlurmCluster

pytest.importorskip("datatrove")
pytest.importorskip("pyarrow")

SLURM = {"time": "0:05:00", "partition": "main", "mem_per_cpu_gb": 1, "poll_seconds": 0.2}


@pytest.mark.slow
def test_the_same_files_as_on_one_machine(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "corpus")
    few = {"deduplication": {"minhash": {"num_buckets": 3, "hashes_per_bucket": 4}}}
    assert curate(recipe(tmp_path, run="here", **few)) == 0
    capsys.readouterr()
    assert curate(recipe(tmp_path, run="there", slurm=SLURM, **few)) == 0
    assert "submitted job" in capsys.readouterr().err
    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")
    accounts = slurm.ask("squeue", "--noheader", "--states=all", "--format=%j")
    assert "curate-5-deduplication-minhash-2" in accounts

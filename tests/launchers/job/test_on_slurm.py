"""On a real Slurm, quickly: dry run, a run on two nodes to its end, status, logs, cancel, and what is refused."""

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_moe.cli import main
from tests.launchers.launched import Launched, write_recipe
from tests.launchers.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.timeout(300)


def launch(recipe: Path, site: Path, *arguments: str, nodes: int = 2) -> int:
    return main(["launch", str(recipe), "--site", str(site), "--nodes", str(nodes), "--time", "10", *arguments])


def output(capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capfd.readouterr()
    return captured.out, captured.err


def test_a_dry_run_prints_a_script_that_slurm_takes_and_does_nothing(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=20)
    assert launch(recipe, site, "--dry-run", "--sbatch", "comment=it's $(touch pwned)") == 0
    script, told = output(capfd)
    assert "#SBATCH --nodes=2\n" in script and "nothing was written or submitted" in told
    assert not (tmp_path / "run").exists() and not slurm.ask("squeue", "-h")
    (tmp_path / "job.sbatch").write_text(script)
    checked = subprocess.run(["sbatch", "--test-only", "job.sbatch"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert subprocess.run(["bash", "-n", tmp_path / "job.sbatch"]).returncode == 0


# Every character that a shell could take for its own, in the name of a folder.
EVIL = "a b'c\"d$(touch pwned)`touch pwned`\n;&|*%j"


def test_two_nodes_train_as_one_machine_does(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    assert (
        main(["launch", str(write_recipe(here, corpus, steps=30)), "--site", str(site), "--local", "--nproc", "2"]) == 0
    )
    folder = tmp_path / EVIL
    folder.mkdir()
    recipe = write_recipe(folder, corpus, steps=30)
    value = 'it\'s "$(touch pwned)" \n#SBATCH --hold'
    secret = "-".join(["do", "not", "write", "me"])  # whole only here: the snapshot may hold this file
    monkeypatch.setenv("SOME_API_TOKEN", secret)
    assert launch(recipe, site, "--env", f"GREETING={value}", "--sbatch", "comment=$(touch pwned) 'x\"") == 0
    run = Launched(folder / "run")
    assert run.job in output(capfd)[0]
    assert launch(recipe, site) == 2
    assert f"already in the queue as job {run.job}" in output(capfd)[1]
    run.wait_until_done()
    assert run.losses() == Launched(here / "run").losses() and len(run.losses()) == 30
    slurm.wait_for(lambda: slurm.job(run.job)["JobState"] == "COMPLETED", "the job to end")

    assert main(["status", str(run.run_dir), "--json"]) == 0
    row = json.loads(output(capfd)[0])[0]
    assert (row["state"], row["step"], row["attempts"], row["loss"]) == ("complete", 30, 1, run.losses()[-1][1])
    assert main(["logs", str(run.run_dir)]) == 0
    lines = output(capfd)[0].splitlines()
    assert lines == sorted(lines, key=lambda line: line[:23]) and any("[rank 0]" in line for line in lines)

    launched = run.folder.launch
    assert not list(tmp_path.rglob("pwned")) and not list(Path.cwd().glob("pwned"))
    written = [path for path in launched.rglob("*") if path.is_file()]
    assert all(secret not in path.read_text(errors="replace") for path in written)
    assert all(not path.stat().st_mode & stat.S_IWOTH for path in launched.rglob("*"))
    # Both nodes told what they are, and the value of the variable reached the processes as it was.
    facts = run.folder.attempts()[0].read_all("facts")
    assert set(facts) == {"node1", "node3"}, "nodes of one switch"


def test_a_cancelled_run_stays_cancelled(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=5000)
    assert launch(recipe, site) == 0
    run = Launched(tmp_path / "run")
    run.wait(lambda: run.steps() >= 2, "steps")
    assert main(["cancel", str(run.run_dir)]) == 0
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "the job to end")
    output(capfd)
    assert main(["status", str(run.run_dir)]) == 0
    assert "cancelled" in output(capfd)[0]
    assert main(["cancel", str(run.run_dir)]) == 2
    assert "nothing to cancel" in output(capfd)[1]
    time.sleep(1)
    assert slurm.job(run.job)["JobState"] == "CANCELLED"


# With INT, which only the job's steps get, torch's agent ended the ranks, and the run went on as after a failure.
@pytest.mark.parametrize("options", [[], ["--signal=TERM", "--batch"], ["--signal=INT"]], ids=["plain", "TERM", "INT"])
def test_scancel_stops_a_run_and_a_signal_does_not(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, options: list[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=5000)
    assert launch(recipe, site, nodes=1) == 0
    run = Launched(tmp_path / "run")
    run.wait(lambda: run.steps() >= 2, "steps")
    slurm.ask("scancel", *options, run.job)
    slurm.wait_for(run.decisions, "a decision")
    expected = ("requeue", "terminated") if options else ("stop", "cancelled")
    assert (run.decisions()[0]["action"], run.decisions()[0]["kind"]) == expected, run.everything()
    assert run.folder.saved_step() >= 2, "without a checkpoint"


def test_what_cannot_run_is_refused_before_it_is_submitted(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=20)

    def refused(*arguments: str, nodes: int = 2, recipe: Path = recipe) -> str:
        assert launch(recipe, site, *arguments, nodes=nodes) == 2
        message = output(capfd)[1]
        assert message.count("error: ") == 1 and "Traceback" not in message
        return message

    assert "partition 'nowhere' does not exist" in refused("--partition", "nowhere")
    assert "partition closed is DOWN" in refused("--partition", "closed")
    assert "--nodes 9 is more than partition main has: 4" in refused(nodes=9)
    assert "4 nodes (3 of them excluded)" in refused("--exclude", "node[2-4]")
    assert "8 is not a multiple of micro_batch_size 2 x 3" in refused(nodes=3)
    assert "0 nodes of partition main have as many" in refused("--gpus-per-node", "8", "--nproc", "2")
    assert "longer than partition main allows" in refused("--time", "3-00:00:00")
    assert "nothing would be trained" in refused("--time", "00:00:20")
    assert "looks like a secret" in refused("--env", "HF_TOKEN=abc")
    (tmp_path / "file").write_text("")
    unwritable = write_recipe(tmp_path, corpus, steps=20, name="other")
    unwritable.write_text(unwritable.read_text().replace(str(tmp_path / "other"), str(tmp_path / "file" / "run")))
    assert "cannot be written" in refused(recipe=unwritable)
    assert not slurm.ask("squeue", "-h") and not (tmp_path / "run").exists()


def test_without_slurm_it_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=20)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    for arguments in (["launch", str(recipe)], ["launch", str(tmp_path), "--array"]):
        assert main(arguments) == 2
        message = output(capfd)[1]
        assert "there is no Slurm here" in message and message.count("error: ") == 1
    assert main(["launch", str(recipe), "--dry-run"]) == 0
    assert "nothing was checked against a cluster" in output(capfd)[1]
    assert not (tmp_path / "run").exists()

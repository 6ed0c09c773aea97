"""On a real Slurm: whatever happens to a run, its losses are those of an undisturbed one, to the bit."""

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from qwen_moe.cli import main
from tests.launchers.launched import Launched, kill_rank, write_recipe, write_site
from tests.launchers.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 150


@pytest.fixture
def run(slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path) -> Launched:
    """The long recipe on two nodes, some steps after its second checkpoint."""
    recipe = write_recipe(tmp_path, corpus, steps=STEPS)
    assert main(["launch", str(recipe), "--site", str(site), "--nodes", "2", "--time", "10"]) == 0
    started = Launched(tmp_path / "run")
    started.wait(lambda: started.folder.saved_step() >= 20, "two checkpoints")
    return started


def kinds(run: Launched) -> list[tuple[str, str]]:
    return [(decision["kind"], decision["action"]) for decision in run.decisions()]


def check_end(run: Launched, undisturbed: Launched) -> None:
    run.wait_until_done(300)
    assert run.losses() == undisturbed.losses() and len(run.losses()) == STEPS


def test_four_nodes_equal_four_processes(slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path) -> None:
    (tmp_path / "here").mkdir()
    assert main(["train", str(write_recipe(tmp_path / "here", corpus, steps=30)), "launch.nproc=4"]) == 0
    recipe = write_recipe(tmp_path, corpus, steps=30)
    assert main(["launch", str(recipe), "--site", str(site), "--nodes", "4", "--time", "10"]) == 0
    run = Launched(tmp_path / "run")
    run.wait_until_done()
    assert run.losses() == Launched(tmp_path / "here" / "run").losses()
    # Ranks next to each other are under the same switch.
    assert [run.host_of_rank(rank) for rank in range(4)] == ["node1", "node3", "node2", "node4"]


def test_the_warning_before_the_time_limit(slurm: SlurmCluster, run: Launched, undisturbed: Launched) -> None:
    before = run.folder.saved_step()
    slurm.ask("scancel", "--signal=USR1", "--batch", run.job)
    run.wait(lambda: run.decisions(), "a decision")
    assert kinds(run) == [("time limit", "requeue")]
    assert run.decisions()[0]["evidence"]["saved_after"] > before
    check_end(run, undisturbed)
    assert slurm.job(run.job)["Restarts"] == "1"


def test_a_rank_is_killed(slurm: SlurmCluster, run: Launched, undisturbed: Launched) -> None:
    killed_at, host = time.time(), run.host_of_rank(1)
    kill_rank(run, 1, signal.SIGKILL)
    run.wait(lambda: run.decisions(), "a decision")
    decision = run.decisions()[0]
    assert kinds(run) == [("failure", "go on")] and decision["host"] == host
    assert decision["reason"].startswith(f"rank 1 on {decision['host']}: killed by SIGKILL"), decision["reason"]
    assert decision["ended"] - killed_at < 30, "the others are stopped within a bound"
    folder = run.folder.attempts()[0].folder
    # What the other rank was doing: asked for its stack, unless its lost connection made it end with a traceback first.
    words = (folder / "stacks" / "rank-00000.txt").read_text() + (folder / "ranks" / "rank-00000.log").read_text()
    assert "in train" in words
    check_end(run, undisturbed)


def test_a_rank_is_frozen(slurm: SlurmCluster, run: Launched, undisturbed: Launched) -> None:
    kill_rank(run, 1, signal.SIGSTOP)
    run.wait(lambda: run.decisions(), "a decision")
    decision = run.decisions()[0]
    assert kinds(run) == [("hang", "go on")]
    assert f"rank 1 on {run.folder.attempts()[0].read('plan.json')['nodes'][1]} (stopped" in decision["reason"]
    assert "train" in (run.folder.attempts()[0].folder / "stacks" / "rank-00000.txt").read_text()
    check_end(run, undisturbed)


def test_slurmctld_restarts(slurm: SlurmCluster, run: Launched, undisturbed: Launched) -> None:
    slurm.stop_controller()
    kill_rank(run, 0, signal.SIGKILL)  # what is decided meanwhile does not need it
    time.sleep(5)
    slurm.start_controller()
    check_end(run, undisturbed)
    assert kinds(run) == [("failure", "go on"), ("complete", "done")]


def test_slurmd_of_one_node_is_killed(slurm: SlurmCluster, run: Launched, undisturbed: Launched) -> None:
    slurm.stop_slurmd(run.host_of_rank(1))
    check_end(run, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_loses_power(slurm: SlurmCluster, run: Launched, undisturbed: Launched, rank: int) -> None:
    """Rank 0's node is also the one where the conductor runs."""
    host = run.host_of_rank(rank)
    slurm.power_off(host)
    check_end(run, undisturbed)
    assert run.decisions()[0]["kind"] == "node failure"
    assert host not in run.folder.attempts()[-1].read("plan.json")["nodes"]


def test_a_more_urgent_job_takes_the_nodes(slurm: SlurmCluster, run: Launched, undisturbed: Launched) -> None:
    urgent = slurm.ask("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 3")
    run.wait(lambda: run.decisions(), "a decision")
    assert kinds(run) == [("preemption", "requeue")]
    slurm.wait_for(lambda: slurm.job(urgent.strip())["JobState"] == "COMPLETED", "the urgent job", 120)
    check_end(run, undisturbed)


def test_a_run_without_progress_stops(slurm: SlurmCluster, run: Launched) -> None:
    """A fault that each attempt meets again is not tried for ever; what it is, is said."""
    for path in (run.run_dir / "checkpoints").iterdir():
        (path / "manifest.json").unlink(missing_ok=True)
    seen = 0
    while not (run.decisions() and run.decisions()[-1]["action"] == "stop"):
        if len(run.decisions()) == seen and (pids := _training(run, seen)):
            os.kill(pids, signal.SIGKILL)
            seen += 1
        time.sleep(0.05)
    last = run.decisions()[-1]
    assert last["kind"] == "no progress" and "killed by SIGKILL" in last["reason"]
    slurm.wait_for(lambda: slurm.job(run.job)["JobState"] == "FAILED", "the job to fail")


def _training(run: Launched, attempt: int) -> int:
    """Pid of rank 0 of the attempt of this index, when it is there."""
    attempts = run.folder.attempts()
    if len(attempts) <= attempt:
        return 0
    for report in attempts[attempt].read_all("nodes").values():
        for rank, state in report["ranks"].items():
            if rank == "0":
                return int(state["pid"])
    return 0


def test_a_node_with_a_full_disk_is_left_out(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, undisturbed: Launched
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # Of node1 only: each host has its own mounts.
    slurm.on("node1", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(scratch))
    try:
        site = write_site(tmp_path / "slurm.toml")
        site.write_text(site.read_text().replace("[preflight]", f'[preflight]\ndisk_folder = "{scratch}"'))
        recipe = write_recipe(tmp_path, corpus, steps=STEPS)
        assert main(["launch", str(recipe), "--site", str(site), "--nodes", "2", "--time", "10"]) == 0
        run = Launched(tmp_path / "run")
        check_end(run, undisturbed)
        first = run.decisions()[0]
        assert (first["kind"], first["action"], list(first["nodes"])) == ("preflight", "exclude", ["node1"])
        assert "GB free" in first["nodes"]["node1"]
        assert "node1" not in run.folder.attempts()[-1].read("plan.json")["nodes"]
    finally:
        slurm.on("node1", "umount", str(scratch))


def test_a_slow_node_is_left_out(slurm: SlurmCluster, tmp_path: Path, corpus: Path, undisturbed: Launched) -> None:
    site = write_site(tmp_path / "slurm.toml")
    limits = 'level = "full"\nmin_all_reduce_gb_per_second = 0.02'
    site.write_text(site.read_text().replace('level = "quick"', limits))
    slurm.slow_down("node2", "40mbit")  # 5 MB/s
    try:
        recipe = write_recipe(tmp_path, corpus, steps=STEPS, training__global_batch_size=12)
        # Three of four nodes: the first choice of the scheduler has node2 in it.
        values = yaml.safe_load(recipe.read_text())
        values["training"]["train_tokens"] = 20 * 12 * 32
        recipe.write_text(yaml.safe_dump(values))
        assert main(["launch", str(recipe), "--site", str(site), "--nodes", "3", "--time", "10"]) == 0
        run = Launched(tmp_path / "run")
        run.wait_until_done(300)
        placed = [attempt.read("plan.json")["nodes"] for attempt in run.folder.attempts()]
        assert "node2" in placed[0] and "node2" not in placed[-1]
        first = run.decisions()[0]
        assert first["action"] == "exclude" and list(first["nodes"]) == ["node2"]
        assert "all-reduce" in first["nodes"]["node2"]
    finally:
        slurm.speed_up("node2")


def test_an_array_of_twelve_with_two_that_fail(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ladder = tmp_path / "ladder"
    ladder.mkdir()
    for index in range(12):
        broken = {"model__vocab_size": 200} if index in (3, 7) else {}  # less than the tokenizer has
        write_recipe(ladder, corpus, steps=10 + index, name=f"rung{index:02d}", **broken)
    command = [
        "launch",
        str(ladder),
        "--site",
        str(site),
        "--array",
        "--max-parallel",
        "4",
        "--nodes",
        "1",
        "--time",
        "10",
    ]
    assert main(command) == 0
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "the array to end", 500)
    capfd.readouterr()
    assert main(["status", str(ladder)]) == 0
    lines = capfd.readouterr().out.splitlines()[1:]
    states = [line.split()[2] for line in lines]
    assert [i for i, state in enumerate(states) if state == "stopped"] == [3, 7] and states.count("complete") == 10
    assert "tokens-tokenizer has" in lines[3]  # cut to the width of the table
    assert "has 300 tokens" in Launched(ladder / "rung03").decisions()[-1]["reason"]

    for index in (3, 7):
        write_recipe(ladder, corpus, steps=10 + index, name=f"rung{index:02d}")
    assert main(command) == 0
    assert "(2 tasks)" in capfd.readouterr().out
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "the two to end", 300)
    for index in range(12):
        rung = Launched(ladder / f"rung{index:02d}")
        assert rung.decisions()[-1]["action"] == "done" and len(rung.losses()) == 10 + index
        assert len(rung.decisions()) == (2 if index in (3, 7) else 1)


def test_branches_of_a_ladder_wait_for_their_trunks(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two trunks of which one fails: its branch says so and can be launched again after it, alone."""
    ladder = tmp_path / "ladder"
    ladder.mkdir()
    tokens = 8 * 32
    decaying = {"schedule__kind": "wsd", "schedule__decay_tokens": 4 * tokens}
    for name, vocabulary in (("trunk_a", 300), ("trunk_b", 200)):
        write_recipe(ladder, corpus, steps=20, name=name, model__vocab_size=vocabulary, **decaying)
        _edit(ladder / f"{name}.yaml", checkpoint={"keep_steps": [8], "interval": 100})
    for name in ("a", "b"):
        write_recipe(ladder, corpus, steps=12, name=f"branch_{name}", **decaying)
        start = ladder / f"trunk_{name}" / "checkpoints" / "step_00000008"
        _edit(
            ladder / f"branch_{name}.yaml", checkpoint={"branch_from": str(start)}, data={"order_tokens": 20 * tokens}
        )
    command = ["launch", str(ladder), "--site", str(site), "--array", "--nodes", "1", "--time", "10"]
    assert main(command) == 0
    told = capfd.readouterr().out
    assert told.count("(2 tasks)") == 2 and "after the previous array" in told
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "the arrays to end", 300)
    ends = {name: Launched(ladder / name).decisions()[-1] for name in ("trunk_a", "trunk_b", "branch_a", "branch_b")}
    assert [end["action"] for end in ends.values()] == ["done", "stop", "done", "stop"]
    assert "train the run that it belongs to first" in ends["branch_b"]["reason"]
    assert [step for step, _ in Launched(ladder / "branch_a").losses()] == [9, 10, 11, 12]

    _edit(ladder / "trunk_b.yaml", model={"vocab_size": 300})
    assert main(command) == 0
    assert capfd.readouterr().out.count("(1 task)") == 2
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "the two to end", 300)
    assert Launched(ladder / "branch_b").losses() == Launched(ladder / "branch_a").losses()


def _edit(path: Path, **sections: dict[str, object]) -> None:
    values = yaml.safe_load(path.read_text())
    for section, changes in sections.items():
        values[section] |= changes
    path.write_text(yaml.safe_dump(values))


def test_what_follows_a_run_waits_for_its_success(
    slurm: SlurmCluster, tmp_path: Path, corpus: Path, site: Path
) -> None:
    recipe = write_recipe(tmp_path, corpus, steps=10)
    then = f"cp '{tmp_path}/run/metrics.jsonl' '{tmp_path}/after.jsonl'"
    arguments = ["--site", str(site), "--nodes", "2", "--time", "10", "--then", then]
    assert main(["launch", str(recipe), *arguments]) == 0
    run = Launched(tmp_path / "run")
    run.wait_until_done()
    slurm.wait_for((tmp_path / "after.jsonl").exists, "the job that follows")
    assert len((tmp_path / "after.jsonl").read_text().splitlines()) == 10

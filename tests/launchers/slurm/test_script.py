"""The script, the site file, the queue's texts and the placement; bash reads the script, no cluster needed."""

import math
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.errors import LaunchError
from launchers.folder.logs import merged
from launchers.folder.run_folder import RunFolder
from launchers.folder.secrets import is_secret
from launchers.slurm import commands as slurm
from launchers.slurm.placement import describe, order_nodes
from launchers.slurm.script import JobSpec, parse_environment, render
from launchers.slurm.site import Site, load_site, parse_site
from qwen_moe.launch.redact import redact

EVIL = "a b'c\"d$(touch pwned)`touch pwned`\n;&|*"


def spec(folder: Path, **changes: object) -> JobSpec:
    base = JobSpec(
        name="run-1",
        folder=folder / "launch",
        workdir=folder,
        python="python3",
        code_root=folder,
        nodes=2,
        processes_per_node=8,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _bash(script: str, folder: Path) -> str:
    """Run the script with an `srun` and a `python3` that only print their arguments; stdout."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("srun", "python3"):
        (tools / name).write_text('#!/bin/bash\nprintf "%s\\0" "$0" "$GREETING" "$PWD" "$@"\n')
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_values_reach_the_processes_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / EVIL
    folder.mkdir()
    script = render(spec(folder, environment={"GREETING": EVIL}, srun_args=("--comment=" + EVIL,)))
    found = _bash(script, tmp_path).split("\0")
    assert found[1] == EVIL and found[2] == str(folder)
    arguments = found[3:-1]
    assert arguments[:5] == ["-u", "-m", "launchers.job.conductor", "--run", str(folder)]
    assert "srun" in arguments and "--nodes=2" in arguments and "--comment=" + EVIL in arguments
    assert not list(tmp_path.rglob("pwned"))


def test_options_are_sbatchs_own(tmp_path: Path) -> None:
    script = render(
        spec(
            tmp_path,
            time="24:00:00",
            account="lab a",
            partition="gpu",
            gpus_per_node=8,
            exclude="n[1-3]",
            dependency="singleton,afterok:12",
            sbatch_args=("mail-type=END", "--reservation=it's mine"),
            array="0-11%4",
        )
    )
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in options)
    given = dict(words[0].removeprefix("--").partition("=")[::2] for words in options)
    assert given["nodes"] == "2" and given["ntasks-per-node"] == "1" and given["gpus-per-node"] == "8"
    assert given["account"] == "lab a" and given["reservation"] == "it's mine" and given["exclude"] == "n[1-3]"
    assert given["signal"] == "B:USR1@300" and given["open-mode"] == "append" and "requeue" in given
    assert given["dependency"] == "singleton,afterok:12" and given["kill-on-invalid-dep"] == "yes"
    assert given["output"] == "slurm-%A_%a.out" and given["array"] == "0-11%4"


def test_the_steps_get_the_scripts_variables_whatever_the_site_exports(tmp_path: Path) -> None:
    assert "  --export=ALL" in render(spec(tmp_path)).splitlines()


def test_a_set_up_command_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    script = render(spec(tmp_path, setup=("true", "(exit 3)", "touch went-on")))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/bin"})
    assert done.returncode == 1 and "set-up command '(exit 3)'" in done.stderr
    assert not (tmp_path / "went-on").exists()


@pytest.mark.parametrize("name", ["JWT", "GITHUB_PAT", "SSH_KEY", "PASSPHRASE", "HF_TOKEN", "DB_PASS", "accessToken"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["PWD", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "NCCL_IB_PKEY", "pass_fds", "MONKEY"])
def test_names_of_other_things(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ('{"password": "hunter2"}', "hunter2"),
        ("password: correcthorse", "correcthorse"),
        ("postgres://me:s3cr3tpw@db/x", "s3cr3tpw"),
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("glpat-" + "a1" * 10, "a1a1a1"),
        ("AKIA" + "A1B2" * 4, "A1B2A1B2"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.abc_def", "eyJzdWIi"),
        ("+-----BEGIN RSA PRIVATE KEY-----\n+MIIabc\n+-----END RSA PRIVATE KEY-----", "MIIabc"),
        ("curl --token abcd1234efgh", "abcd1234efgh"),
    ],
)
def test_shapes_of_secrets(text: str, secret: str) -> None:
    assert secret not in redact(text)


@pytest.mark.parametrize(
    "text", ["index 3f2a9c1d4e5b6f708192a3b4c5d6e7f8091a2b3c", "/data/corpus/tokens-0001.bin", "num_key_value_heads: 2",
             'eos_token: "<|endoftext|>"', "token = text", "password = os.environ['X']"],
)  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    assert redact(text) == text


def test_containers(tmp_path: Path) -> None:
    script = render(spec(tmp_path, container_image="/images/torch.sqsh", container_mounts=("/data:/data",)))
    assert "--container-image=/images/torch.sqsh" in script and "/data:/data" in script and str(tmp_path) in script
    with pytest.raises(LaunchError, match="contains a comma"):
        render(spec(tmp_path, container_image="x", container_mounts=("/a,b:/c",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN looks like a secret"),
        ({"environment": {"A B": "x"}}, "a name has letters"),
        ({"sbatch_args": ("output=x",)}, "--output is written by qwen-moe"),
        ({"sbatch_args": ("x y",)}, "is not a long option of sbatch"),
        ({"account": "a\n#SBATCH --hold"}, "holds a line break"),
    ],
)
def test_what_cannot_be_written(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=message):
        render(spec(tmp_path, **changes))


def test_environment_arguments() -> None:
    assert parse_environment(["A=1=2", "B="]) == {"A": "1=2", "B": ""}
    with pytest.raises(LaunchError, match="NAME=VALUE"):
        parse_environment(["A"])


def test_secrets_are_taken_out_of_snapshots() -> None:
    key = "hf_" + "a1B2" * 8
    text = redact(f"x = '{key}'\npassword=hunter2hunter2\nkept = 3")
    assert key not in text and "hunter2" not in text and "kept = 3" in text


def test_every_mistake_of_a_site_file_is_named_at_once() -> None:
    values = {
        "slurm": {"partion": "x", "nodes": "two"},
        "survive": {"hang_seconds": -1, "checkpoint_signal": "KILL"},
        "surivve": {},
        "environment": {"NCCL_DEBUG": ["INFO"]},
    }
    with pytest.raises(LaunchError) as caught:
        parse_site(values, "site.toml")
    for part in (
        "unknown key 'slurm.partion'; did you mean 'slurm.partition'?",
        "slurm.nodes is 'two', expected int",
        "unknown table 'surivve'; did you mean 'survive'?",
        "environment.NCCL_DEBUG must be a string or a number",
    ):
        assert part in str(caught.value)
    with pytest.raises(LaunchError, match=r"survive.checkpoint_signal is 'KILL'.*survive.hang_seconds is -1"):
        parse_site({"survive": values["survive"]}, "site.toml")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_site_files_numbers_are_finite(value: float) -> None:
    with pytest.raises(LaunchError, match=r"hardware\.peak_tflops is (nan|inf)"):
        parse_site({"hardware": {"peak_tflops": value}}, "site.toml")
    with pytest.raises(LaunchError, match=r"environment\.A must be a string or a number"):
        parse_site({"environment": {"A": value}}, "site.toml")


def test_site_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load_site() == Site()
    (tmp_path / "qwen-moe").mkdir()
    (tmp_path / "qwen-moe" / "slurm.toml").write_text(
        '[slurm]\npartition = "gpu"\n[environment]\nNCCL_IB_HCA = "mlx5"\n'
    )
    site = load_site()
    assert site.slurm.partition == "gpu" and site.environment == {"NCCL_IB_HCA": "mlx5"}
    with pytest.raises(LaunchError, match="does not exist"):
        load_site(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:30", 30.5),
        ("24:00:00", 1440),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("1-00:00:30", 1440.5),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_times(text: str, minutes: float | None) -> None:
    assert slurm.parse_minutes(text) == minutes


def test_a_wrong_time_is_an_error() -> None:
    with pytest.raises(LaunchError, match="is not a Slurm time"):
        slurm.parse_minutes("24h")


def test_texts_of_scontrol_and_sinfo() -> None:
    line = "JobId=12 JobName=a b JobState=RUNNING Reason=None Comment=it is = fine NodeList=n[1-2]"
    facts = slurm.fields(line)
    assert facts["JobName"] == "a b" and facts["JobState"] == "RUNNING" and facts["NodeList"] == "n[1-2]"
    for gres, count in (
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:a100:2,gpu:v100:4,nic:2", 6),
        ("gpu:1g.10gb:7", 7),
        ("gpu:1080ti:4(S:0,1)", 4),
        ("(null)", 0),
        ("nic:4", 0),
    ):
        assert slurm.gpus_of(gres) == count, gres


def test_nodes_of_one_switch_get_ranks_in_a_row() -> None:
    switches = {"n1": "s1", "n2": "s2", "n3": "s1", "n4": "s2"}
    nodes = order_nodes(["n1", "n2", "n3", "n4"], switches)
    assert nodes == ["n1", "n3", "n2", "n4"] and order_nodes(["n4", "n2"], {}) == ["n4", "n2"]
    text = describe(nodes, 4, switches, {"tp": 4, "ep": 8, "wide": 16})
    assert "n3  s1  4-7" in text
    assert "tp groups of 4 ranks: inside a node" in text
    assert "ep groups of 8 ranks: under one switch" in text
    assert "wide groups of 16 ranks: across switches" in text


def test_logs_are_merged_by_time(tmp_path: Path) -> None:
    attempt = RunFolder(tmp_path).new_attempt()
    folder = attempt.folder / "ranks"
    (folder / "rank-00000.log").write_text("2026-01-01T00:00:00.100 a\n2026-01-01T00:00:02.000 c\n")
    (folder / "rank-00001.log").write_text("2026-01-01T00:00:01.000 b\n")
    assert [line[-10:] for line in merged(attempt)] == ["[rank 0] a", "[rank 1] b", "[rank 0] c"]
    assert list(merged(attempt, 1)) == ["2026-01-01T00:00:01.000 [rank 1] b"]

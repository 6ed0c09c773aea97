"""Variables of the user's shell and set-up commands: bash runs the script's lines, sbatch and module are stand-ins."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.slurm import commands as slurm
from launchers.slurm.set_up import checked, without_variables
from qwen_moe.launch import command as launch
from tests.launchers.slurm.test_request import built

# As Tcl modules of version 3 do: a status of 0 whatever happens.
MODULE = """
module() {
  shift
  for name in "$@"; do
    case $name in
    good*) export LOADEDMODULES="${LOADEDMODULES:+$LOADEDMODULES:}$name/1.0";;
    alias) export LOADEDMODULES="${LOADEDMODULES:+$LOADEDMODULES:}vendor/other/2";;
    quiet) ;;
    *) echo "ModuleCmd_Load.c(213):ERROR:105: Unable to locate a modulefile for '$name'" >&2;;
    esac
  done
  return 0
}
"""


def bash(lines: list[str], **environ: str) -> "subprocess.CompletedProcess[str]":
    script = "\n".join([*lines, "echo went on with ${LOADEDMODULES:-none}"])
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"} | environ
    )


@pytest.mark.parametrize(
    "command",
    [
        "module load missing",
        "module load good missing",
        "module add quiet",
        "ml load missing",
        "module -s load missing",
    ],
)
def test_modules_that_do_not_load_end_the_job(command: str) -> None:
    found = bash(
        [
            MODULE.replace("{\n  shift", "{\n  shift; [ $1 != load ] || shift"),
            'ml() { module ml "$@"; }',
            *checked([command]),
        ]
    )
    assert found.returncode == 1 and f"set-up command '{command}' of the site file failed" in found.stderr
    assert "went on" not in found.stdout


@pytest.mark.parametrize(
    ("commands", "loaded"),
    [
        (["module load good"], "good/1.0"),
        (["module load good/latest"], "good/latest/1.0"),
        (["module load alias"], "vendor/other/2"),
        (["module load good better || true"], "good/1.0"),
        (["module load good; export X=1"], "good/1.0"),
        (["module load good1", "module load good2"], "good1/1.0:good2/1.0"),
        (["module() { :; }", "LOADEDMODULES=cuda/12", "module load cuda"], "cuda/12"),
    ],
)
def test_modules_that_load(commands: list[str], loaded: str) -> None:
    found = bash([MODULE, *checked(commands)])
    assert (found.returncode, found.stdout) == (0, f"went on with {loaded}\n"), found.stderr


def test_steps_do_not_read_the_variables_of_the_shell() -> None:
    given = {"SRUN_EXPORT_ENV": "NONE", "SLURM_NTASKS": "7", "SLURM_TIMELIMIT": "1", "SLURM_JOB_ID": "5", "OTHER": "x"}
    found = bash(["set -u", *without_variables(), "env"], **given).stdout.splitlines()
    left = {line.partition("=")[0] for line in found}
    assert {"SLURM_JOB_ID", "OTHER"} <= left and not left & {"SRUN_EXPORT_ENV", "SLURM_NTASKS", "SLURM_TIMELIMIT"}


def test_sbatch_gets_no_variable_that_stands_over_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\necho '7;cluster'\n")
    sbatch.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --partition=a\n#SBATCH --signal=B:USR1@300\n#SBATCH --mem=0\n#SBATCH --time=5\n"
    )
    gone = "SBATCH_PARTITION SBATCH_SIGNAL SBATCH_MEM_PER_CPU SBATCH_TIMELIMIT SBATCH_WAIT SRUN_EXPORT_ENV SLURM_NTASKS"
    stays = "SBATCH_EXPORT SBATCH_RESERVATION SBATCH_ACCOUNT SLURM_CONF HF_HOME"
    for name in (gone + " SLURM_MEM_PER_NODE SQUEUE_STATES " + stays).split():
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin")
    assert slurm.submit(script) == "7"
    seen = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert set(stays.split()) <= seen
    assert not seen & {*gone.split(), "SLURM_MEM_PER_NODE", "SQUEUE_STATES"}


def test_the_shells_defaults_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "c,d")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "30")
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "a100:2")
    spec = built(tmp_path)
    assert (spec.partition, spec.time, spec.gpus_per_node, spec.gpu_request) == ("c,d", "30", 2, "a100:2")
    assert built(tmp_path, partition="b").partition == "b" and built(tmp_path, "--partition", "a").partition == "a"


def test_the_command_after_a_run_is_set_up_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "submit", lambda script: "8")
    spec = replace(built(tmp_path), setup=("false",), workdir=tmp_path)
    spec.folder.mkdir(parents=True)
    launch._submit_then("touch went-on", spec, "7")
    done = subprocess.run(["bash", str(spec.folder / "then.sbatch")], capture_output=True, text=True)
    assert done.returncode == 1 and "set-up command 'false'" in done.stderr and not (tmp_path / "went-on").exists()
    spec = replace(spec, setup=("true",))
    launch._submit_then("touch went-on", spec, "7")
    assert (
        subprocess.run(["bash", str(spec.folder / "then.sbatch")]).returncode == 0 and (tmp_path / "went-on").exists()
    )

"""What is asked of the cluster, against stand-ins for its commands: lists of partitions, GPUs by type, free options."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.errors import LaunchError
from launchers.slurm import commands as slurm
from launchers.slurm import refuse
from launchers.slurm.request import gpus_in_gres, parse_gpus, split_names
from launchers.slurm.script import JobSpec, render
from launchers.slurm.site import Site
from qwen_moe.launch import command, prepare

SCONTROL = """#!/bin/sh
case "$*" in
"show partition -o")
  echo "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP Nodes=n[1-2]"
  echo "PartitionName=gpu-long Default=NO MaxNodes=1 MaxTime=7-00:00:00 State=UP Nodes=n[1-2]";;
"show hostnames"*) shift 2; echo "$1" | tr ',' '\\n';;
*) exit 1;;
esac
"""
SINFO = '#!/bin/sh\necho "n1|idle|64|gpu:a100:4,gpu:1g.10gb:7"\necho "n2|idle|64|gpu:a100:4,gpu:1g.10gb:7"\n'


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH with two partitions of two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("sinfo", SINFO)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin:/bin")
    return folder


def built(tmp_path: Path, *options: str, **site: Any) -> JobSpec:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    args = parser.parse_args(["launch", "recipe.yaml", *options])
    config: Any = SimpleNamespace(run_dir=tmp_path / "run")
    return prepare.build_spec(config, Site(slurm=replace(Site().slurm, **site)), args)


def answer(spec: JobSpec) -> tuple[list[str], list[str]]:
    return refuse.check_partitions(spec, slurm.partitions(split_names(spec.partition)))


def _lines(spec: JobSpec) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in render(spec).splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("options", [("--partition", "gpu,gpu-long"), ("--sbatch", "partition=gpu,gpu-long")])
def test_a_list_of_partitions(options: tuple[str, ...], cluster: Path, tmp_path: Path) -> None:
    spec = built(tmp_path, *options)
    assert answer(spec) == ([], []) and _lines(spec).count("partition=gpu,gpu-long") == 1
    problems, notes = answer(replace(spec, time="3-0"))
    assert not problems and len(notes) == 1 and "--time 3-0 is longer than partition gpu allows: 2880" in notes[0]
    problems, notes = answer(replace(spec, time="3-0", nodes=2))
    assert len(problems) == 2 and not notes  # too long for the one, too many nodes for the other
    assert "gpu-long allows for one job: 1" in problems[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu,nope", "partition 'nope' does not exist: .* of gpu, gpu-long"),
        ("nope,nix", "partitions 'nope' and 'nix' do not exist"),
        ("gpu,,gpu-long", "contains an empty name"),
    ],
)
def test_partitions_that_are_not_there(text: str, message: str, cluster: Path) -> None:
    with pytest.raises(LaunchError, match=message):
        slurm.partitions(split_names(text))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--gpus-per-node", "a100:4"), "gpus-per-node=a100:4"),
        (("--gpus-per-node", "4"), "gpus-per-node=4"),
        (("--sbatch", "gpus-per-node=A100:4"), "gpus-per-node=A100:4"),
        (("--sbatch", "gres=gpu:a100:4"), "gres=gpu:a100:4"),
        (("--sbatch", "gres=gpu:1g.10gb:4,tmp:2"), "gres=gpu:1g.10gb:4,tmp:2"),
    ],
)
def test_gpus_by_type(options: tuple[str, ...], line: str, cluster: Path, tmp_path: Path) -> None:
    spec = built(tmp_path, *options)
    assert (spec.gpus_per_node, spec.processes_per_node) == (4, 4) and answer(spec) == ([], [])
    assert [x for x in _lines(spec) if x.startswith(("gres", "gpus"))] == [line]


@pytest.mark.parametrize("options", [("--gpus-per-node", "a100:5"), ("--sbatch", "gres=gpu:a100:5")])
def test_more_gpus_of_a_type_than_nodes_have(options: tuple[str, ...], cluster: Path, tmp_path: Path) -> None:
    problems, _ = answer(built(tmp_path, *options))
    assert problems == ["--gpus-per-node a100:5: 0 nodes of partition gpu have as many (nodes have 1g.10gb:7, a100:4)"]


def test_no_time_limit_where_the_partition_has_one(cluster: Path, tmp_path: Path) -> None:
    (problem,), _ = answer(built(tmp_path, "--time", "0"))
    assert problem == "--time 0 asks for no limit, which is longer than partition gpu allows: 2880 minutes"


def test_the_command_line_stands_over_the_site_file(tmp_path: Path) -> None:
    site = {"partition": "a", "gpus_per_node": 2, "sbatch_args": ["gres=gpu:a100:8,tmp:1", "comment=x", "qos=low"]}
    assert {"gres=gpu:a100:8,tmp:1", "partition=a", "comment=x", "qos=low"} <= set(_lines(built(tmp_path, **site)))
    given = built(tmp_path, "--gpus-per-node", "h100:4", "--sbatch", "partition=b,c", "--qos", "high", **site)
    assert {"gres=gpu:h100:4,tmp:1", "partition=b,c", "comment=x", "qos=high"} <= set(_lines(given))
    assert given.gpus_per_node == 4 and sum("gpu" in line for line in _lines(given)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--partition", "a", "--sbatch", "partition=b"), "contradict each other"),
        (("--sbatch", "qos=a", "--sbatch", "qos=b"), "gives --qos as 'a' and as 'b'"),
        (("--sbatch", "partition"), "has no value"),
        (("--sbatch", "cpus-per-task=x"), "expected a whole number"),
        (("--gpus-per-node", "0"), "1 or more"),
        (("--gpus-per-node", "x"), "TYPE:NUMBER"),
        (("--gpus-per-node", "a:1,a:2"), "names a twice"),
    ],
)
def test_wrong_requests(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=message):
        built(tmp_path, *options)


def test_forms_of_requests() -> None:
    assert parse_gpus("8") == {"": 8} and parse_gpus("a100:2,1g.10gb:7") == {"a100": 2, "1g.10gb": 7}
    assert gpus_in_gres("gpu") == ("1", "") and gpus_in_gres("gpu:a100") == ("a100:1", "")
    assert gpus_in_gres("tmp:5,gres/gpu:2") == ("2", "tmp:5") and gpus_in_gres("none") == ("", "none")

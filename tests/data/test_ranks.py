"""Every machine has the same data, or all ranks say on which it differs."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from qwen_moe.data.manifest import bin_path
from qwen_moe.data.megatron import IndexedDatasetBuilder
from qwen_moe.data.ranks import same_on_all_ranks, verified_on_all_ranks
from qwen_moe.errors import UserError
from tests.distributed import run_distributed


def write_tokens(prefix: Path) -> None:
    prefix.parent.mkdir(parents=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.arange(100))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")


def _verify(folder: str) -> str:
    """Each rank as the first of its machine, with that machine's disk under the same relative path."""
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(Path(folder) / os.environ["RANK"])
    try:
        found = verified_on_all_ranks([Path("data")], 1000, Path("verified.json"))
    except UserError as error:
        return str(error)
    return str(found[Path("data")].tokens)


def _fail_on_the_first_rank() -> str:
    try:
        return str(same_on_all_ranks(lambda: Path("/nowhere/at/all").read_text()))
    except UserError as error:
        return str(error)


def test_machines_with_copies_of_their_own(tmp_path: Path) -> None:
    for rank in range(3):
        write_tokens(tmp_path / str(rank) / "data")
    assert run_distributed(_verify, 3, str(tmp_path)) == ["100"] * 3
    content = bytearray(bin_path(tmp_path / "2" / "data").read_bytes())
    content[7] ^= 1
    bin_path(tmp_path / "2" / "data").write_bytes(content)
    found = run_distributed(_verify, 3, str(tmp_path))
    assert len(set(found)) == 1 and found[0].startswith("on the machine of rank 2: data.bin"), found
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "1").mkdir()
    found = run_distributed(_verify, 3, str(tmp_path))
    assert len(set(found)) == 1 and "rank 1: data.bin or .idx does not exist" in found[0], found


def test_an_error_on_the_first_rank_reaches_all() -> None:
    found = run_distributed(_fail_on_the_first_rank, 2)
    assert len(set(found)) == 1 and "/nowhere/at/all" in found[0]

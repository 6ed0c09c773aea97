"""`.metadata` of a checkpoint: what DCP wrote is read as DCP reads it, and nothing that it asks for is executed."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

from qwen_moe.checkpoint.directory import commit, file_entry, files_in, partial_path, step_directory
from qwen_moe.checkpoint.huggingface.convert import from_pretrained
from qwen_moe.checkpoint.manifest import METADATA, MODEL_CONFIG, CheckpointDamaged
from qwen_moe.checkpoint.metadata import SafeReader, read_metadata
from qwen_moe.checkpoint.tensor_store import CheckpointTensors
from qwen_moe.cli import main
from qwen_moe.errors import UserError
from tests.small import small_model

STATE = {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(1.5), "c": torch.zeros(0, 3)}, "rng": {"x": 3}}
A = MetadataIndex("model.a", (0, 0))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A DCP checkpoint without a manifest, as torch writes it; `sealed` makes one of ours of it."""
    path = tmp_path / "written"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(STATE, checkpoint_id=path, no_dist=True)
    return path


def test_it_is_what_dcp_itself_reads(checkpoint: Path) -> None:
    theirs, ours = dcp.FileSystemReader(checkpoint).read_metadata(), read_metadata(checkpoint)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    source = CheckpointTensors(checkpoint)
    for name, tensor in STATE["model"].items():
        assert torch.equal(source.read(name), tensor)


class _Runs:
    """Unpickled as usual, it calls ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _with(checkpoint: Path, found: Any) -> None:
    (checkpoint / METADATA).write_bytes(pickle.dumps(found))


def _known(checkpoint: Path) -> Metadata:
    return pickle.loads((checkpoint / METADATA).read_bytes())


@pytest.mark.parametrize("place", ["instead", "planner_data", "key", "version"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_nothing_of_a_strangers_checkpoint_runs(checkpoint: Path, place: str, protocol: int) -> None:
    evil = _Runs(os.mkdir, str(checkpoint / "made"))
    found: Any = _known(checkpoint)
    if place == "instead":
        found = evil
    elif place == "key":
        found.storage_data[evil] = found.storage_data[A]
    else:
        setattr(found, place, evil)
    (checkpoint / METADATA).write_bytes(pickle.dumps(found, protocol))
    with pytest.raises(CheckpointDamaged, match=r"it asks for \S*mkdir, which is not part of a checkpoint's metadata"):
        read_metadata(checkpoint)
    assert not (checkpoint / "made").exists()
    pickle.loads((checkpoint / METADATA).read_bytes())  # what torch's own reader does with the same file
    assert (checkpoint / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x11serialization.loadt\x93.",  # an attribute of an attribute
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
        b"(itorch\nload\n.",
        b"\x80\x02\x82\x01.",  # of copyreg's registry of extensions
        b"Psomething\n.",
        b"",
        b"\x80\x04.",
        b"not a pickle",
        b"(" * 1000,
    ],
)
def test_whatever_else_a_pickle_may_ask_for_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / METADATA).write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"\.metadata is not the metadata of a checkpoint"):
        read_metadata(checkpoint)


def _no_place(found: Metadata) -> None:
    del found.storage_data[A]


def _elsewhere(name: str) -> Any:
    def change(found: Metadata) -> None:
        found.storage_data[A] = _StorageInfo(name, 0, 10)

    return change


def _chunk(*offsets: int) -> Any:
    def change(found: Metadata) -> None:
        entry = found.state_dict_metadata["model.a"]
        entry.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size((3, 4)))]  # type: ignore[union-attr]

    return change


def _fewer(found: Metadata) -> None:
    found.state_dict_metadata["model.a"].chunks.clear()  # type: ignore[union-attr]


def _compressed(found: Metadata) -> None:
    found.storage_data[A].transform_descriptors = ["stream.zstd/1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_place, r"a part of model\.a at \(0, 0\) lies in no file"),
        (_elsewhere("../../secret"), "leads out of the directory"),
        (_elsewhere("/etc/passwd"), "is an absolute path"),
        (_elsewhere("nothing"), "cannot be read: No such file"),
        (_chunk(1, 0), r"a part of model\.a at \(1, 0\) does not lie in its shape \(3, 4\)"),
        (_fewer, r"the parts of model\.a do not have as many elements"),
        (_compressed, "is compressed or encrypted"),
        (lambda found: found.storage_data.update({A: _StorageInfo("__0_0.distcp", 0, 10**9)}), "is said to end at"),
        (lambda found: found.storage_data.update({A: 3}), "a _StorageInfo is expected, found int"),
        (
            lambda found: found.state_dict_metadata.update({"model.a": 3}),
            "a TensorStorageMetadata is expected, found int",
        ),
        (lambda found: setattr(found, "storage_data", None), "is not the metadata of a checkpoint"),
    ],
)
def test_metadata_that_cannot_be_true_is_refused(checkpoint: Path, change: Any, message: str) -> None:
    found = _known(checkpoint)
    change(found)
    _with(checkpoint, found)
    with pytest.raises(CheckpointDamaged, match=message):
        read_metadata(checkpoint)


def test_flipped_bits_of_metadata_are_harmless_or_refused_in_one_message(checkpoint: Path) -> None:
    """The manifest's SHA-256 finds these first; this is a checkpoint whose manifest was written after the damage."""
    whole = (checkpoint / METADATA).read_bytes()
    for bit in range(0, 8 * len(whole), 29):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (checkpoint / METADATA).write_bytes(content)
        try:
            found = read_metadata(checkpoint)
        except CheckpointDamaged:
            continue
        for place in found.storage_data.values():
            assert (checkpoint / place.relative_path).is_file()


def test_an_object_where_a_tensor_is_expected_is_not_unpickled(checkpoint: Path) -> None:
    """DCP reads such an entry by torch.load(weights_only=False), whatever the reader asked for."""
    found = _known(checkpoint)
    evil = pickle.dumps(_Runs(os.mkdir, str(checkpoint / "made")))
    (checkpoint / "evil.distcp").write_bytes(evil)
    found.state_dict_metadata["model.a"] = BytesStorageMetadata()
    found.storage_data[MetadataIndex("model.a")] = _StorageInfo("evil.distcp", 0, len(evil))
    _with(checkpoint, found)
    source = CheckpointTensors(checkpoint)
    assert "a" not in source.shapes()
    with pytest.raises(UserError, match="is not a tensor in the checkpoint but another object, so it is not read"):
        from qwen_moe.checkpoint.distributed import _load

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _load(SafeReader(checkpoint), {"model": {"a": torch.zeros(3, 4)}})
    assert not (checkpoint / "made").exists()


def test_a_shard_that_is_a_pickle_is_not_executed(checkpoint: Path) -> None:
    evil = pickle.dumps(_Runs(os.mkdir, str(checkpoint / "made")))
    found = _known(checkpoint)
    (checkpoint / "evil.distcp").write_bytes(evil)
    found.storage_data[A] = _StorageInfo("evil.distcp", 0, len(evil))
    _with(checkpoint, found)
    with pytest.raises(UserError, match=f"a of checkpoint {checkpoint} cannot be read"):
        CheckpointTensors(checkpoint).read("a")
    assert not (checkpoint / "made").exists()


def test_the_commands_refuse_it_in_one_message(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _with(checkpoint, _Runs(os.mkdir, str(tmp_path / "made")))
    (checkpoint / MODEL_CONFIG).write_text(small_model().model_dump_json())
    path = step_directory(tmp_path, 1)
    checkpoint.rename(partial_path(path))
    commit(path, {f.as_posix(): file_entry(partial_path(path) / f) for f in files_in(partial_path(path))}, {})
    assert main(["convert", "to-hf", str(path), str(tmp_path / "hf")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "which is not part of a checkpoint's metadata" in message
    assert message.count("\n") == 1 and not (tmp_path / "made").exists()
    with pytest.raises(UserError, match="which is not part of a checkpoint's metadata"):
        from_pretrained(path)
    assert not (tmp_path / "made").exists()

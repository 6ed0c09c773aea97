"""Damaged or hostile weights: whatever file it is, one message that names it, and nothing written."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.checkpoint.directory import commit, file_entry, files_in
from qwen_moe.checkpoint.finite import count_not_finite
from qwen_moe.checkpoint.huggingface.convert import (
    HF_SHARDS,
    convert_from_hf,
    convert_to_hf,
    from_pretrained,
    save_pretrained,
)
from qwen_moe.checkpoint.huggingface.directory import INDEX, SINGLE
from qwen_moe.checkpoint.huggingface.safetensors_file import read_header
from qwen_moe.checkpoint.manifest import MANIFEST
from qwen_moe.errors import UserError
from tests.checkpoint.huggingface.directories import by_hand, files_of
from tests.checkpoint.huggingface.test_convert import EXPERT, model, refuse

NORM = "model.norm.weight"


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes, bytes], bytes]:
    def spoil(header: bytes, data: bytes) -> bytes:
        values = json.loads(header)
        change(values)
        return _file(json.dumps(values).encode(), data)

    return spoil


def _file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _set(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[NORM].update(values)


HEADERS: list[tuple[Callable[[bytes, bytes], bytes], str]] = [
    (lambda header, data: b"", "is not a safetensors file, or is truncated"),
    (lambda header, data: b"\x07\0\0", "is not a safetensors file, or is truncated"),
    (lambda header, data: b"\xff" * 8 + header + data, "is not a safetensors file, or is truncated"),
    (
        lambda header, data: (1 << 40).to_bytes(8, "little") + header + data,
        "is not a safetensors file, or is truncated",
    ),
    (lambda header, data: _file(b"not JSON", data), r"is not a safetensors file \(header: Expecting value"),
    (lambda header, data: _file(b"[]", data), "it is not a JSON object"),
    (lambda header, data: _file(b"7", data), "it is not a JSON object"),
    (lambda header, data: _file(b"[" * 50_000, data), r"is not a safetensors file \(header"),
    (lambda header, data: _file(b"\xff\xfe{}", data), "its header is not text"),
    (lambda header, data: _file(header.rstrip()[:-1] + b',"a":{},"a":{}}', data), "a name occurs twice"),
    (lambda header, data: _file(header, data[:-1]), "truncated or damaged"),
    (lambda header, data: _file(header, data + b"0"), "truncated or damaged"),
    (_header(lambda header: header.update(a=3)), "a tensor has no dtype"),
    (_header(lambda header: header.update(__metadata__=[])), "__metadata__ is not a JSON object"),
    (_header(_set(dtype=["F32"])), "a tensor has no dtype"),
    (_header(_set(dtype="F33")), f"tensor {NORM} in .* has dtype F33"),
    (_header(_set(shape="8")), "8 is not a list of sizes"),
    (_header(_set(shape=["8"])), "is not a list of sizes"),
    (_header(_set(shape=[8.0])), "is not a list of sizes"),
    (_header(_set(shape=[True] * 8)), "is not a list of sizes"),
    (_header(_set(shape=[-8])), "is not a list of sizes"),
    (_header(_set(shape=[10**300])), "is not a list of sizes"),
    (_header(_set(shape=[2**61, 2**61])), "which does not fit its shape"),
    (_header(_set(data_offsets=[0])), "a tensor has no begin and end"),
    (_header(_set(data_offsets="0,32")), "is not a list of sizes"),
    (_header(_set(data_offsets=[None, 3])), "is not a list of sizes"),
    (_header(_set(data_offsets=[0, 10**12])), "which does not fit its shape"),
    (_header(_set(data_offsets=[10**12, 10**12 + 32])), "which does not fit its shape"),
    (_header(_set(data_offsets=[0, 32])), "which does not fit its shape"),
]


@pytest.mark.parametrize(("spoil", "message"), HEADERS)
def test_damaged_safetensors(tmp_path: Path, spoil: Callable[[bytes, bytes], bytes], message: str) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    path = tmp_path / "hf" / SINGLE
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(spoil(content[8:begin], content[begin:]))
    tracemalloc.start()
    refuse(tmp_path, message)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_flipped_bits_of_a_header_are_refused_or_read(tmp_path: Path) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    path = tmp_path / "hf" / SINGLE
    whole = path.read_bytes()
    refused = 0
    for bit in range(0, 8 * (8 + int.from_bytes(whole[:8], "little")), 67):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            header = read_header(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert header.data_start + header.data_bytes == len(whole)
            assert all(math.prod(e.shape) * e.dtype.itemsize == e.end - e.start for e in header.entries.values())
    assert refused > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update({EXPERT: 3}), "names an invalid shard: 3 is not a file name"),
        (lambda index: index["weight_map"].update({EXPERT: ["a"]}), "names an invalid shard"),
        (lambda index: index["weight_map"].update({EXPERT: "../x.safetensors"}), "leads out of the directory"),
        (lambda index: index["weight_map"].update({EXPERT: "/x.safetensors"}), "is an absolute path"),
        (
            lambda index: index["weight_map"].update({EXPERT: "sub/x.safetensors"}),
            r"expected a \.safetensors file beside",
        ),
        (lambda index: index["weight_map"].update({EXPERT: "x.bin"}), r"expected a \.safetensors file beside"),
        (lambda index: index.update(weight_map=[]), "has no weight_map"),
        (lambda index: index.clear(), "has no weight_map"),
    ],
)
def test_damaged_index(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=3)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    change(index)
    (tmp_path / "hf" / INDEX).write_text(json.dumps(index))
    refuse(tmp_path, message)


def _sealed_again(checkpoint: Path) -> None:
    """A manifest for what is there now: what a stranger would make, who can compute SHA-256 too."""
    (checkpoint / MANIFEST).unlink()
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    checkpoint.rename(partial)
    commit(checkpoint, {f.as_posix(): file_entry(partial / f) for f in files_in(partial)}, {})


def _renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    def change(layout: dict[str, Any]) -> None:
        layout["headers"][name] = layout["headers"].pop(SINGLE)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed("../../x.safetensors"), "leads out of the directory"),
        (_renamed("/tmp/x.safetensors"), "is an absolute path"),
        (_renamed("C:x.safetensors"), "is an absolute path"),
        (_renamed("config.json"), r"expected a \.safetensors file beside it"),
        (_renamed("hf/x.safetensors"), r"expected a \.safetensors file beside it"),
        (lambda layout: layout["headers"].update(Model_safetensors=1), "does not say how tensors lie"),
        (
            lambda layout: layout["headers"].update({SINGLE.upper().replace("SAFETENSORS", "safetensors"): "{}"}),
            "does not",
        ),
        (lambda layout: layout["headers"].update({SINGLE: "{"}), "is not a safetensors file"),
        (lambda layout: layout.update(headers=[]), "does not say how tensors lie"),
        (lambda layout: layout.update(index=3), "does not say how tensors lie"),
        (lambda layout: layout.clear(), "does not say how tensors lie"),
    ],
)
def test_a_strangers_shard_names(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    by_hand(tmp_path / "in" / "hf", model(), torch.float32, files=1)
    checkpoint = tmp_path / "in" / "checkpoint"
    convert_from_hf(tmp_path / "in" / "hf", checkpoint)
    layout = json.loads((checkpoint / HF_SHARDS).read_text())
    change(layout)
    (checkpoint / HF_SHARDS).write_text(json.dumps(layout))
    _sealed_again(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        convert_to_hf(checkpoint, tmp_path / "in" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_says_something_else_is_made_anew(tmp_path: Path) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=3)
    checkpoint = tmp_path / "checkpoint"
    convert_from_hf(tmp_path / "hf", checkpoint)
    layout = json.loads((checkpoint / HF_SHARDS).read_text())
    right = json.loads(layout["index"])
    layout["index"] = layout["index"].replace("part-0", "../part-0")
    (checkpoint / HF_SHARDS).write_text(json.dumps(layout))
    _sealed_again(checkpoint)
    convert_to_hf(checkpoint, tmp_path / "back")
    assert json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"] == right["weight_map"]


def test_links_beside_weights(tmp_path: Path) -> None:
    """One that leads out of the directory is told of and not followed; those of the Hugging Face cache are its files."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    (tmp_path / "hf" / "notes.txt").symlink_to(secret)
    (tmp_path / "hf" / "again.txt").symlink_to("LICENSE")
    converted = convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert [note for note in converted.notes if note.startswith("notes.txt is a link to a file outside ")]
    assert not (tmp_path / "checkpoint" / "hf" / "notes.txt").exists()
    assert (tmp_path / "checkpoint" / "hf" / "again.txt").is_file()

    # A link that a stranger put into a checkpoint, listed in no manifest.
    (tmp_path / "checkpoint" / "hf" / "more.txt").symlink_to(secret)
    back = convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert not (tmp_path / "back" / "more.txt").exists() and any("more.txt is a link" in note for note in back.notes)

    cache = tmp_path / "cache"
    (cache / "snapshots").mkdir(parents=True)
    (tmp_path / "hf" / "notes.txt").unlink()
    (tmp_path / "hf").rename(cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    for name in ("config.json", "LICENSE", SINGLE):
        (cache / "snapshots" / "abc" / name).rename(cache / "blobs" / name)
        (cache / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{name}")
    notes = convert_from_hf(cache / "snapshots" / "abc", tmp_path / "cached").notes
    assert not any("is a link" in note for note in notes)
    assert (tmp_path / "cached" / "hf" / "LICENSE").read_bytes() == (cache / "blobs" / "LICENSE").read_bytes()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _cut, _empty, Path.unlink])
def test_any_damaged_file_of_a_checkpoint_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """Every file in turn; put back, the checkpoint is whole again."""
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    checkpoint = tmp_path / "checkpoint"
    convert_from_hf(tmp_path / "hf", checkpoint)
    for name in sorted({*files_of(checkpoint), MANIFEST}):
        whole = (checkpoint / name).read_bytes()
        damage(checkpoint / name)
        with pytest.raises(UserError) as caught:
            convert_to_hf(checkpoint, tmp_path / "back")
        assert (name if name != MANIFEST else str(checkpoint)) in str(caught.value), name
        (checkpoint / name).write_bytes(whole)
    assert not (tmp_path / "back").exists()
    convert_to_hf(checkpoint, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 9).to(dtype)
    assert count_not_finite(tensor) == 0 and count_not_finite(tensor[:0]) == 0
    tensor[1, 2], tensor[3, 4], tensor[6, 8] = float("nan"), float("inf"), float("-inf")
    for value in (float("nan"), float("inf"), float("-inf")):
        one = torch.randn(5).to(dtype)
        one[3] = value
        assert count_not_finite(one) == 1
    assert count_not_finite(tensor) == 3
    assert count_not_finite(torch.tensor([1, 2])) == 0


def test_weights_with_nan_are_named_and_not_used(tmp_path: Path) -> None:
    ours = model()
    with torch.no_grad():
        ours.model.layers[1].self_attn.o_proj.weight[2, 3] = float("nan")
        ours.model.layers[1].self_attn.o_proj.weight[4, 5] = float("-inf")
    message = r"tensor model\.layers\.1\.self_attn\.o_proj\.weight of .* holds 2 of 256 values that are NaN or infinite"
    by_hand(tmp_path / "hf", ours, torch.float32, files=1)
    refuse(tmp_path, message)
    with pytest.raises(UserError, match=message):
        save_pretrained(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_the_exported_dtype_cannot_hold(tmp_path: Path) -> None:
    ours = model()
    with torch.no_grad():
        ours.model.norm.weight[2] = 1e5
    message = r"1 value of tensor model\.norm\.weight is larger than float16 can hold \(6\.55e\+04\)"
    save_pretrained(ours, tmp_path / "fp32")
    with pytest.raises(UserError, match=message):
        save_pretrained(ours, tmp_path / "fp16", dtype="fp16")
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path / "fp32", dtype="fp16")
    assert from_pretrained(tmp_path / "fp32", dtype="bf16").model.norm.weight[2] == torch.tensor(1e5).bfloat16()

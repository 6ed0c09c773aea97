"""Strictness: what a directory or checkpoint must hold, and that nothing is written when it does not."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_moe
from qwen_moe.checkpoint.huggingface import convert as huggingface
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained, save_pretrained
from qwen_moe.checkpoint.huggingface.directory import parse_size
from qwen_moe.errors import UserError
from qwen_moe.models.decoder import DecoderLM
from tests.checkpoint.huggingface.directories import (
    by_hand,
    files_of,
    old_style_config,
    tensors_of,
    tensors_on_disk,
    write_tensors,
)
from tests.models.hf_reference import draw_weights, to_hf_names
from tests.small import small_model

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def model(seed: int = 1, **changes: Any) -> DecoderLM:
    return draw_weights(small_model(**changes), seed, torch.float32)


def nothing_written(folder: Path, *inputs: str) -> bool:
    return {path.name for path in folder.iterdir()} <= set(inputs)


def refuse(folder: Path, message: str) -> None:
    """Both readers of the directory folder/hf refuse it with ``message`` and leave nothing behind."""
    with pytest.raises(UserError, match=message):
        convert_from_hf(folder / "hf", folder / "checkpoint")
    assert nothing_written(folder, "hf")
    with pytest.raises(UserError, match=message):
        from_pretrained(folder / "hf")


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[EXPERT]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.6.up_proj.weight"] = tensors[EXPERT].clone()


def _extra_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(8)


def _transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()


def _no_bias(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.self_attn.v_proj.bias"]


def _no_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def _two_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].bfloat16()


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.int8)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (_missing, rf"1 missing: {EXPERT}"),
        (_extra, r"1 not known to qwen2_moe: model\.layers\.1\.mlp\.experts\.6\.up_proj"),
        (_extra_bias, r"not known to qwen2_moe: model\.layers\.0\.self_attn\.o_proj\.bias"),
        (_transposed, rf"{EXPERT} is \[16, 8\], expected \[8, 16\]"),
        (_no_bias, r"missing: model\.layers\.0\.self_attn\.v_proj\.bias"),
        (_no_head, r"missing: lm_head\.weight"),
        (_two_dtypes, rf"{EXPERT} is torch\.bfloat16.*must have one dtype"),
        (_integers, rf"{EXPERT} in .* has dtype I8.*quantized"),
    ],
)
def test_wrong_tensors(tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str, files: int) -> None:
    ours = model()
    tensors = tensors_on_disk(ours)
    spoil(tensors)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(old_style_config(ours, torch.float32)))
    write_tensors(tmp_path / "hf", tensors, files)
    refuse(tmp_path, message)


def _truncate(directory: Path) -> None:
    file = directory / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _no_data(directory: Path) -> None:
    (directory / "part-1.safetensors").write_bytes(b"1234")


def _html(directory: Path) -> None:
    (directory / "part-1.safetensors").write_bytes(b"<!DOCTYPE html><html>404: not found</html>")


def _absent(directory: Path) -> None:
    (directory / "part-1.safetensors").unlink()


def _stray(directory: Path) -> None:
    shutil.copy(directory / "part-1.safetensors", directory / "consolidated.safetensors")


def _no_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def _wrong_index(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = (
        f"part-{'01'[index['weight_map']['model.norm.weight'] == 'part-0.safetensors']}.safetensors"
    )
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _number_in_index(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = 7
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _overlapping(directory: Path) -> None:
    file = directory / "part-1.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    _, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"][0] -= 1
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _no_weights(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _cut_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "qwen2')


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_truncate, r"part-1\.safetensors has \d+ bytes, expected \d+: truncated"),
        (_no_data, r"part-1\.safetensors is not a safetensors file"),
        (_html, r"part-1\.safetensors is not a safetensors file"),
        (_absent, r"shard part-1\.safetensors of .* is missing"),
        (_stray, r"consolidated\.safetensors of .* is not listed"),
        (_no_index, r"3 \.safetensors files but no model\.safetensors\.index\.json"),
        (_wrong_index, r"places tensor model\.norm\.weight in part-"),
        (_number_in_index, "names an invalid shard: .*7.*; download it again"),
        (_overlapping, r"does not fit its shape"),
        (_no_weights, r"no \.safetensors file, only part-0\.bin"),
        (_no_config, r"config\.json does not exist"),
        (_cut_config, r"config\.json is not valid JSON"),
    ],
)
def test_damaged_directory(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=3)
    spoil(tmp_path / "hf")
    refuse(tmp_path, message)


def _named(*names: str) -> Callable[[Path], None]:
    """The one file under other names."""

    def spoil(directory: Path) -> None:
        content = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").unlink()
        for name in names:
            (directory / name).write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_named("model.fp16.safetensors"), r"only model\.fp16\.safetensors, expected model\.safetensors .*: rename it"),
        (
            _named("adapter_model.safetensors"),
            "adapter_model.safetensors, which is an adapter: merge it into its model",
        ),
        (_named("model.safetensors", "a.safetensors"), r"a\.safetensors beside model\.safetensors and no .*: remove"),
        (_named("consolidated.00.pth"), r"only consolidated\.00\.pth, which is a pickle"),
        (_named("model.gguf"), r"only model\.gguf, which is of another format"),
        (_named("model.safetensors.index.json"), r"only the index .*: download the whole directory again"),
        (_named("README.md"), "no .safetensors file, no weights: download"),
    ],
)
def test_weights_under_another_name(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    spoil(tmp_path / "hf")
    refuse(tmp_path, message)


def test_no_such_directory(tmp_path: Path) -> None:
    refuse(tmp_path, "hf does not exist")
    (tmp_path / "hf").write_text("{}")
    refuse(tmp_path, "hf is not a directory")


def test_tied_head_on_disk(tmp_path: Path) -> None:
    """Kept byte for byte when it equals the embedding, refused when it does not."""
    ours = model(tie_word_embeddings=True)
    tensors = tensors_on_disk(ours)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    by_hand(tmp_path / "hf", ours, torch.float32, files=1)
    write_tensors(tmp_path / "hf", tensors, files=2)
    (tmp_path / "hf" / "model.safetensors").unlink()
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "fresh", max_shard_size=10**9)
    assert "lm_head.weight" not in tensors_of(tmp_path / "fresh")

    folder = tmp_path / "other"
    shutil.copytree(tmp_path / "hf", folder / "hf")
    tensors["lm_head.weight"][0, 0] += 1
    write_tensors(folder / "hf", tensors, files=2)
    refuse(folder, "lm_head.weight differs from model.embed_tokens.weight")


def test_recomputed_buffers_are_ignored(tmp_path: Path) -> None:
    ours = model()
    tensors = tensors_on_disk(ours)
    expected = dict(tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    by_hand(tmp_path / "hf", ours, torch.float32, files=1)
    write_tensors(tmp_path / "hf", tensors, files=1)
    result = convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert any("inv_freq" in note for note in result.notes)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    found = tensors_of(tmp_path / "back")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_fused_experts_are_read(tmp_path: Path) -> None:
    """The layout of transformers 5 in memory, should a directory hold it; it comes back as it was."""
    ours = model()
    by_hand(tmp_path / "hf", ours, torch.float32, files=1)
    write_tensors(tmp_path / "hf", {n: t.clone() for n, t in to_hf_names(dict(ours.state_dict())).items()}, files=1)
    found = from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.state_dict().items())
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "apart", max_shard_size="5GB")
    apart, expected = tensors_of(tmp_path / "apart"), tensors_on_disk(ours)
    assert apart.keys() == expected.keys() and all(torch.equal(apart[name], expected[name]) for name in expected)


def test_config_without_a_dtype_comes_back_unless_the_dtype_changes(tmp_path: Path) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    path = tmp_path / "hf" / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(values))
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "bf16", dtype="bf16")
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert written == values | dict.fromkeys(("dtype", "torch_dtype"), "bfloat16")


def test_target_that_holds_something(tmp_path: Path) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="taken exists and is not empty"):
        convert_from_hf(tmp_path / "hf", tmp_path / "taken")
    for name, where in (("link", tmp_path / "empty"), ("dead", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(where)  # which the finished directory could not replace
        with pytest.raises(UserError, match=f"{name} is a link to {where}: give that directory itself"):
            convert_from_hf(tmp_path / "hf", tmp_path / name)
    convert_from_hf(tmp_path / "hf", tmp_path / "empty")
    with pytest.raises(UserError, match="taken exists and is not empty"):
        convert_to_hf(tmp_path / "empty", tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known beforehand: refused before a byte is written."""
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs [1-9]\d*\.\d\d MB but its disk has 0\.00 MB free"):
        convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert nothing_written(tmp_path, "hf")


@pytest.mark.parametrize("direction", ["from", "to"])
def test_disk_full_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    """One message, and neither a half directory nor its temporary name stays."""
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "copy_files", full)
    with pytest.raises(UserError, match="target was not written: no space left"):
        if direction == "from":
            convert_from_hf(tmp_path / "hf", tmp_path / "target")
        else:
            convert_to_hf(tmp_path / "checkpoint", tmp_path / "target")
    assert nothing_written(tmp_path, "hf", "checkpoint")


def test_source_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside DCP's writer comes out as our one message, not as its wrapped traceback."""
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    opened = huggingface._open_directory(tmp_path / "hf")
    monkeypatch.setattr(huggingface, "_open_directory", lambda _: opened)
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match="ended while tensor"):
        convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert nothing_written(tmp_path, "hf")


def test_what_an_interrupted_conversion_left(tmp_path: Path) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    (tmp_path / "checkpoint.partial").mkdir()
    (tmp_path / "checkpoint.partial" / "junk").write_text("half")
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")


def test_public_names() -> None:
    assert qwen_moe.from_pretrained is from_pretrained and qwen_moe.save_pretrained is save_pretrained


@pytest.mark.parametrize(
    "text, expected", [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("10kb", 10**4), (123, 123), ("7", 7)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["5XB", "", "-1GB", "GB", "0", 0, "1e9"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)

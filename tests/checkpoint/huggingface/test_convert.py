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
from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.checkpoint.huggingface import convert as huggingface
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained, save_pretrained
from qwen_moe.checkpoint.huggingface.directory import parse_size
from qwen_moe.checkpoint.resolve import resolve_checkpoint
from qwen_moe.config import ModelConfig
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
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights, to_hf_names

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def small(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": "qwen2_moe",
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 4,
    }
    return ModelConfig(**(values | changes))


def model(seed: int = 1, **changes: Any) -> DecoderLM:
    return draw_weights(small(**changes), seed, torch.float32)


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
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = tensors[EXPERT].clone()


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
        (_extra, r"1 not known to qwen2_moe: model\.layers\.1\.mlp\.experts\.4\.up_proj"),
        (_extra_bias, r"not known to qwen2_moe: model\.layers\.0\.self_attn\.o_proj\.bias"),
        (_transposed, rf"{EXPERT} is \[8, 6\], expected \[6, 8\]"),
        (_no_bias, r"missing: model\.layers\.0\.self_attn\.v_proj\.bias"),
        (_no_head, r"missing: lm_head\.weight"),
        (_two_dtypes, rf"{EXPERT} is torch\.bfloat16.*must have one dtype"),
        (_integers, rf"{EXPERT} in .* has dtype I8.*quantised"),
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
        (_number_in_index, "names a shard that is none: .*7.*; download it again"),
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


def test_no_such_directory(tmp_path: Path) -> None:
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


def test_target_that_holds_something(tmp_path: Path) -> None:
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="taken exists and is not empty"):
        convert_from_hf(tmp_path / "hf", tmp_path / "taken")
    convert_from_hf(tmp_path / "hf", tmp_path / "empty")
    with pytest.raises(UserError, match="taken exists and is not empty"):
        convert_to_hf(tmp_path / "empty", tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known beforehand: refused before a byte is written."""
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs .* GB but its disk has 0\.00 GB free"):
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


def test_expert_bias(tmp_path: Path) -> None:
    """Hugging Face cannot hold it: refused unless told to drop it; zero is not worth a word."""
    ours = model()
    save_pretrained(ours, tmp_path / "zero")
    ours.model.layers[1].mlp.gate.expert_bias[2] = 0.25
    with pytest.raises(
        UserError, match=r"nonzero expert_bias \(model\.layers\.1\.mlp\.gate\.expert_bias.*--drop-expert-bias"
    ):
        save_pretrained(ours, tmp_path / "refused")
    save_pretrained(ours, tmp_path / "dropped", drop_expert_bias=True)
    assert files_of(tmp_path / "zero") == files_of(tmp_path / "dropped")

    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    rewritten = _as_training_checkpoint(tmp_path / "run" / "checkpoints", 10, ours, "fp32")
    with pytest.raises(UserError, match="--drop-expert-bias"):
        convert_to_hf(rewritten, tmp_path / "back")
    assert convert_to_hf(rewritten, tmp_path / "back", drop_expert_bias=True).notes != ()
    assert torch.equal(from_pretrained(rewritten).model.layers[1].mlp.gate.expert_bias, torch.tensor([0, 0, 0.25, 0]))


def _as_training_checkpoint(root: Path, step: int, ours: DecoderLM, compute: str) -> Path:
    """A checkpoint with optimizer state beside the weights, in one file, as a training run leaves it."""
    import torch.distributed.checkpoint as dcp

    from qwen_moe.checkpoint.directory import commit, file_entry, files_in, partial_path

    path = step_directory(root, step)
    partial = partial_path(path)
    partial.mkdir(parents=True)
    state = dict(ours.state_dict())
    moments = {name: torch.randn_like(parameter) for name, parameter in ours.named_parameters()}
    dcp.save(
        {"model": state, "optimizer": {"exp_avg": moments}, "rng": {"step": 3}}, checkpoint_id=partial, no_dist=True
    )
    (partial / "model_config.json").write_text(ours.config.model_dump_json())
    entries = {file.as_posix(): file_entry(partial / file) for file in files_in(partial)}
    commit(path, entries, {"step": step, "compute_dtype": compute})
    return path


@pytest.mark.parametrize("compute, expected", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_training_checkpoint_is_exported_in_the_computed_dtype(
    tmp_path: Path, compute: str, expected: torch.dtype
) -> None:
    """fp32 master weights of a bf16 run give bf16 files; everything else as stored. The run directory will do."""
    _as_training_checkpoint(tmp_path / "run" / "checkpoints", 5, model(seed=9), compute)
    ours = model()
    _as_training_checkpoint(tmp_path / "run" / "checkpoints", 10, ours, compute)
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "checkpoints")):
        target = tmp_path / f"hf{number}"
        convert_to_hf(source, target)
        found, wanted = tensors_of(target), tensors_on_disk(ours)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name].to(expected)) for name in wanted)
        values = json.loads((target / "config.json").read_text())
        assert values["dtype"] == values["torch_dtype"] == str(expected).removeprefix("torch.")
    assert from_pretrained(tmp_path / "run", dtype=None).head_weight.dtype == expected


def test_newest_valid_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run" / "checkpoints"
    paths = [_as_training_checkpoint(root, step, model(seed=step), "fp32") for step in (1, 2, 3)]
    assert resolve_checkpoint(tmp_path / "run") == paths[2]
    (paths[2] / "model_config.json").write_text("{}")
    assert resolve_checkpoint(root) == paths[1]
    assert "step_00000003 is damaged and not used" in capsys.readouterr().err
    with pytest.raises(UserError, match="step_00000003 is damaged"):
        resolve_checkpoint(paths[2])
    for path in paths[:2]:
        next(path.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(UserError, match="all 3 checkpoints"):
        resolve_checkpoint(root)
    for path in paths:
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="all 3 checkpoints"):
        from_pretrained(tmp_path / "run")
    assert capsys.readouterr().err.count("is not a complete checkpoint: it has no manifest.json") == 3
    with pytest.raises(UserError, match=r"is not a checkpoint \(it has no manifest\.json\)"):
        from_pretrained(paths[0])


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        convert_to_hf(tmp_path / "nowhere", tmp_path / "hf")
    with pytest.raises(UserError, match="is not a checkpoint"):
        convert_to_hf(tmp_path, tmp_path / "hf")
    by_hand(tmp_path / "hf", model(), torch.float32, files=1)
    with pytest.raises(UserError, match=r"is a Hugging Face directory, not a checkpoint.*from-hf"):
        convert_to_hf(tmp_path / "hf", tmp_path / "again")
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"is a checkpoint, not a Hugging Face directory.*to-hf"):
        convert_from_hf(tmp_path / "checkpoint", tmp_path / "again")


def test_checkpoint_whose_config_is_of_another_model(tmp_path: Path) -> None:
    ours = model()
    ours.config = small(vocab_size=40)
    path = _as_training_checkpoint(tmp_path, 1, ours, "fp32")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is \[32, 8\], expected \[40, 8\]"):
        convert_to_hf(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def _save_sharded(root: Path, seed: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours = model(seed, num_experts=5)
    mesh = init_device_mesh("cpu", (2,))
    for layer in ours.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": ours.state_dict()}, checkpoint_id=root)


def test_sharded_checkpoint_is_exported(tmp_path: Path) -> None:
    """Saved by two processes, five experts split unevenly: the same files as from the whole model."""
    from qwen_moe.checkpoint.directory import commit, file_entry, files_in, partial_path

    path = tmp_path / "step_00000001"
    run_distributed(_save_sharded, 2, partial_path(path), 3)
    ours = model(3, num_experts=5)
    (partial_path(path) / "model_config.json").write_text(ours.config.model_dump_json())
    commit(path, {f.as_posix(): file_entry(partial_path(path) / f) for f in files_in(partial_path(path))}, {})
    convert_to_hf(path, tmp_path / "sharded")
    save_pretrained(ours, tmp_path / "whole")
    assert files_of(tmp_path / "sharded") == files_of(tmp_path / "whole")


def test_original_config_is_kept_where_it_holds(tmp_path: Path) -> None:
    ours = model()
    original = old_style_config(ours, torch.float32) | {"eos_token_id": 7, "my_key": [1, 2]}
    save_pretrained(ours, tmp_path / "same", original_config=original)
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == original
    save_pretrained(ours, tmp_path / "bf16", dtype="bf16", original_config=original)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == original | {"torch_dtype": "bfloat16"}
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "bf16").values()} == {torch.bfloat16}


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

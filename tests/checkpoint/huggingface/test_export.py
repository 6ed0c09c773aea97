"""Checkpoints of training as Hugging Face directories: which one, in which dtype, from sharded state."""

import json
from pathlib import Path

import pytest
import torch

from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained, save_pretrained
from qwen_moe.checkpoint.resolve import resolve_checkpoint
from qwen_moe.errors import UserError
from qwen_moe.models.decoder import DecoderLM
from tests.checkpoint.huggingface.directories import (
    by_hand,
    files_of,
    old_style_config,
    tensors_of,
    tensors_on_disk,
)
from tests.checkpoint.huggingface.test_convert import model
from tests.distributed import run_distributed
from tests.small import small_model


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
    ours.config = small_model(vocab_size=40)
    path = _as_training_checkpoint(tmp_path, 1, ours, "fp32")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is \[53, 16\], expected \[40, 16\]"):
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
    assert torch.equal(
        from_pretrained(rewritten).model.layers[1].mlp.gate.expert_bias, torch.tensor([0, 0, 0.25, 0, 0, 0])
    )

"""Hugging Face -> checkpoint -> Hugging Face gives the same bytes, for random shapes, and what we export loads there."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained, save_pretrained
from qwen_moe.checkpoint.resolve import side_folder
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from tests.checkpoint.huggingface.directories import (
    by_hand,
    by_transformers,
    convert,
    files_of,
    tensors_of,
    tensors_on_disk,
)
from tests.models.hf_reference import FAMILIES, draw_weights, model_configs, true_float64
from tests.small import small_model

SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", FAMILIES)
@SETTINGS
@given(data=st.data())
def test_round_trip_is_bit_identical(family: str, data: st.DataObject) -> None:
    """Every file, byte for byte: written by transformers or by hand, whatever the shards."""
    ours = draw_weights(data.draw(model_configs((family,))), data.draw(st.integers(0, 99)), torch.float32)
    dtype = data.draw(DTYPES)
    with tempfile.TemporaryDirectory() as folder:
        hf, checkpoint, back = (Path(folder) / name for name in ("hf", "checkpoint", "back"))
        if data.draw(st.booleans()):
            by_transformers(hf, ours, dtype, data.draw(st.sampled_from(["1KB", "3KB", "20KB", "5GB"])))
        else:
            by_hand(hf, ours, dtype, data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99)))
        assert convert("from-hf", hf, checkpoint) == 0
        assert convert("to-hf", checkpoint, back) == 0
        expected, found = files_of(hf), files_of(back)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []


def test_round_trip_keeps_keys_that_hold_nothing(tmp_path: Path) -> None:
    """Tools that merge adapters or dequantize write null for what is not there."""
    by_hand(tmp_path / "hf", draw_weights(small_model(), 1, torch.float32), torch.float32, files=1)
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    nothing = dict.fromkeys(["quantization_config", "rope_scaling", "layer_types", "eos_token_id", "made_up"])
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values | nothing))
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")


def test_files_whose_names_a_manifest_cannot_hold(tmp_path: Path) -> None:
    """They are said and left out: with them, the checkpoint would count as damaged."""
    by_hand(tmp_path / "hf", draw_weights(small_model(), 1, torch.float32), torch.float32, files=1)
    expected = files_of(tmp_path / "hf")
    names = [b"back\\slash.txt", b"two\nlines.txt", b"\xff.txt", "données.txt".encode()]
    for name in names:
        (tmp_path / "hf" / os.fsdecode(name)).write_bytes(b"kept")
    notes = convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint").notes
    assert sum("not allowed in a file name and is not kept" in note for note in notes) == 3
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == expected | {"données.txt": b"kept"}


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "checkpoints/step_00000001/manifest.json"])
def test_a_publishers_own_manifest(tmp_path: Path, name: str) -> None:
    """It makes no checkpoint of a Hugging Face directory."""
    by_hand(tmp_path / "hf", draw_weights(small_model(), 1, torch.float32), torch.float32, files=1)
    (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "hf" / name).write_text("{}")
    (tmp_path / "hf" / "hf").mkdir()
    assert side_folder(tmp_path / "hf") == tmp_path / "hf"
    from_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="is a Hugging Face directory, not a checkpoint"):
        convert_to_hf(tmp_path / "hf", tmp_path / "back")
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert side_folder(tmp_path / "checkpoint") == tmp_path / "checkpoint" / "hf"
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")


@pytest.mark.parametrize("family", FAMILIES)
@SETTINGS
@given(data=st.data())
def test_other_shard_sizes_and_dtypes(family: str, data: st.DataObject) -> None:
    """With --max-shard-size files are as small as asked; with --dtype every tensor is the rounded one."""
    ours = draw_weights(data.draw(model_configs((family,))), 5, torch.float32)
    stored = data.draw(DTYPES)
    target = data.draw(st.sampled_from(["bf16", "fp16", "fp32", None]))
    limit = data.draw(st.sampled_from([1, 2000, 9000, None]))
    with tempfile.TemporaryDirectory() as folder:
        hf, checkpoint, back = (Path(folder) / name for name in ("hf", "checkpoint", "back"))
        by_hand(hf, ours, stored, 2)
        convert_from_hf(hf, checkpoint)
        convert_to_hf(checkpoint, back, dtype=target, max_shard_size=limit)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: stored}[target]
        same_bits(tensors_of(back), {name: t.to(stored).to(dtype) for name, t in tensors_on_disk(ours).items()})
        config = json.loads((back / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
        if limit is None:
            assert sorted(path.name for path in back.glob("*.safetensors")) == [
                "part-0.safetensors",
                "part-1.safetensors",
            ]
        for path in back.glob("*.safetensors") if limit else ():
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            sizes = [
                value["data_offsets"][1] - value["data_offsets"][0] for key, value in header.items() if key[0] != "_"
            ]
            assert sum(sizes) <= max(limit or 0, max(sizes)) and (len(sizes) == 1 or sum(sizes) <= (limit or 0))


@pytest.mark.parametrize("family", FAMILIES)
@SETTINGS
@given(data=st.data())
def test_transformers_loads_what_we_export(family: str, data: st.DataObject) -> None:
    """No missing, unexpected or misshapen keys, and the same logits in true float64; and back into ours."""
    ours = draw_weights(data.draw(model_configs((family,))), 7)
    ids = torch.arange(14).view(2, 7) % ours.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "hf"
        save_pretrained(ours, directory, max_shard_size=data.draw(st.sampled_from([None, "4KB"])))
        with true_float64():
            theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
            logits = theirs.eval()(input_ids=ids).logits.detach()
        assert not any(report.values()), report
        expected = ours(ids).detach()
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-10
        again = from_pretrained(directory, dtype=torch.float64)
        assert again.config == ours.config and not again.training
        same_bits(dict(again.state_dict()), dict(ours.state_dict()))


def test_our_file_is_the_librarys(tmp_path: Path) -> None:
    """A file of ours has the same bytes as one that the safetensors library writes: order, header, padding."""
    from safetensors.torch import save_file

    from qwen_moe.checkpoint.huggingface.safetensors_file import build_header, write_file

    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2).bfloat16(),
        "\u00fc.c": torch.randn(7).double(),
        "d": torch.randn(0, 4),
        "e": torch.randn(1).half(),
    }
    header = build_header((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    write_file(tmp_path / "ours", header, (tensors[name] for name in header.entries))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_file_of_another_writer(tmp_path: Path) -> None:
    """Tensors in an order of its own, a header with spaces and no metadata: the same bytes come back, and in another
    dtype the same order."""
    ours = draw_weights(small_model("qwen3_moe"), 6, torch.float32)
    by_hand(tmp_path / "hf", ours, torch.float32, files=1)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = dict(reversed(tensors_on_disk(ours).items()))
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.numpy().tobytes()
        header[name] = {
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
            "dtype": "F32",
        }
        data += content
    text = json.dumps(header, indent=1).encode() + b"   "
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    same_bits(tensors_of(tmp_path / "hf"), tensors)
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "half", dtype="bf16")
    with (tmp_path / "half" / "model.safetensors").open("rb") as handle:
        found = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    assert [name for name in found if name != "__metadata__"] == list(tensors)
    same_bits(tensors_of(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_checkpoint_holds_the_documented_state(tmp_path: Path) -> None:
    """Keys and values as DCP itself reads them: what training loads."""
    import torch.distributed.checkpoint as dcp

    config = small_model("qwen3_moe")
    ours = draw_weights(config, 1, torch.float32)
    by_transformers(tmp_path / "hf", ours, torch.float32)
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    into = draw_weights(config, 2, torch.float32)
    known = dcp.FileSystemReader(tmp_path / "checkpoint").read_metadata().state_dict_metadata
    assert known.keys() == {f"model.{name}" for name in into.state_dict()}
    dcp.load({"model": into.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    same_bits(dict(into.state_dict()), dict(ours.state_dict()))
    assert ModelConfig.model_validate_json((tmp_path / "checkpoint" / "model_config.json").read_bytes()) == config

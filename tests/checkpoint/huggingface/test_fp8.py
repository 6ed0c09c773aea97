"""Block-quantized FP8 directories: written by ours and dequantized by transformers' own code, and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf, from_pretrained, save_pretrained
from qwen_moe.checkpoint.huggingface.fp8 import fp8_pieces
from qwen_moe.checkpoint.huggingface.names import parameters
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.models.init import build_model
from tests.checkpoint.huggingface.directories import convert, tensors_on_disk

MODEL: dict[str, Any] = {
    "family": "qwen2_moe",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 72,  # not whole blocks: stays
    "mlp_only_layers": [1],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with weights of many sizes, and its tensors by Hugging Face's names."""
    model = build_model(ModelConfig(**MODEL), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.logspace(-3, 1, parameter.shape[-1]))
    model = model.to(torch.bfloat16)
    save_pretrained(model, tmp_path / "plain")
    convert_from_hf(tmp_path / "plain", tmp_path / "checkpoint")
    return tmp_path / "checkpoint", tensors_on_disk(model)


def test_transformers_reads_what_we_write(checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, replace_with_fp8_linear
    from transformers.models.qwen2_moe import Qwen2MoeForCausalLM
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import FineGrainedFP8Config

    path, plain = checkpoint
    assert convert("to-hf", path, tmp_path / "fp8", "--dtype", "fp8", "--max-shard-size", "300KB") == 0
    files = sorted((tmp_path / "fp8").glob("*.safetensors"))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    settings = FineGrainedFP8Config(**config["quantization_config"])
    assert settings.weight_block_size == [128, 128] and settings.activation_scheme == "dynamic"
    quantized = {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    assert set(plain) == {name for name in found if not name.endswith("_scale_inv")}
    assert {name + "_scale_inv" for name in quantized} == {name for name in found if name.endswith("_scale_inv")}
    dequantize = Fp8Dequantize(None)
    for name, tensor in plain.items():
        if name not in quantized:
            assert torch.equal(found[name], tensor)
            continue
        scale = found[name + "_scale_inv"]
        assert scale.dtype == torch.float32
        value = dequantize._dequantize_one(found[name], scale, torch.float32)
        # E4M3 is off by 2^-4 of a value at most, below its smallest normal by half the smallest step.
        bound = 2.0**-4 * tensor.abs().float() + scale.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2.0**-10
        assert ((value - tensor.float()).abs() <= bound).all(), name
    # The modules that transformers makes FP8 for this config are those that the files hold in FP8.
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(AutoConfig.from_pretrained(tmp_path / "fp8"))
    replaced = replace_with_fp8_linear(model, settings.modules_to_not_convert, settings)
    shapes = {name: tuple(p.shape) for name, p in replaced.named_parameters()}
    for name in quantized:
        if ".experts." not in name:
            assert shapes[name + "_scale_inv"] == tuple(found[name + "_scale_inv"].shape)
    scaled = {name.removesuffix("_scale_inv") for name in shapes if name.endswith("_scale_inv")}
    assert scaled == {n for n in quantized if ".experts." not in n} | {
        f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")
    }
    assert not should_convert_module("model.layers.0.mlp.shared_expert.down_proj", settings.modules_to_not_convert)


def _values(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name + "_scale_inv" not in tensors:
        return tensors[name]
    return tensors[name].float() * tensors[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)


def test_reading_back_and_writing_again_changes_no_value(checkpoint: Any, tmp_path: Path) -> None:
    path, _ = checkpoint
    convert_to_hf(path, tmp_path / "fp8", dtype="fp8")
    read = convert_from_hf(tmp_path / "fp8", tmp_path / "again")
    assert any("dequantized" in note for note in read.notes) and read.dtypes.keys() == {"bfloat16"}
    convert_to_hf(tmp_path / "again", tmp_path / "fp8_again", dtype="fp8")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "fp8_again"))
    assert first.keys() == second.keys()
    for name in first:
        # A block whose largest value was rounded down to a power of two times 224 may have another scale now.
        if not name.endswith("_scale_inv"):
            assert torch.equal(_values(first, name), _values(second, name)), name
    # As bf16: values of the FP8 ones, and no word of quantization in config.json.
    convert_to_hf(tmp_path / "again", tmp_path / "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    wide = load_file(tmp_path / "bf16" / "model.safetensors")[name].float()
    assert torch.equal(wide, _values(first, name))
    model = from_pretrained(tmp_path / "fp8")
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj[1, 1], wide)


def _broken(tmp_path: Path, checkpoint: Path, change: Any) -> str:
    convert_to_hf(checkpoint, tmp_path / "fp8", dtype="fp8")
    file, config = tmp_path / "fp8" / "model.safetensors", tmp_path / "fp8" / "config.json"
    tensors, values = load_file(file), json.loads(config.read_text())
    change(tensors, values)
    save_file(tensors, file)
    config.write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        convert_from_hf(tmp_path / "fp8", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    return str(error.value)


NAME = "model.layers.0.self_attn.q_proj.weight"


def test_what_does_not_belong_together_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint[0]

    def without_scale(tensors: Any, values: Any) -> None:
        del tensors[NAME + "_scale_inv"]

    def scale_of_other_blocks(tensors: Any, values: Any) -> None:
        values["quantization_config"]["weight_block_size"] = [64, 128]

    def not_told(tensors: Any, values: Any) -> None:
        del values["quantization_config"]

    def other_method(tensors: Any, values: Any) -> None:
        values["quantization_config"]["quant_method"] = "gptq"

    cases = [(without_scale, NAME), (scale_of_other_blocks, "expected"), (not_told, "no quantization_config")]
    for index, (change, part) in enumerate([*cases, (other_method, r"quantized (gptq)")]):
        (tmp_path / str(index)).mkdir()
        assert part in _broken(tmp_path / str(index), path, change)


def test_routers_and_gates_stay_even_where_they_are_whole_blocks() -> None:
    """128 experts, as Qwen3-30B-A3B has, make a router of whole blocks; transformers does not quantize it."""
    config = ModelConfig(**MODEL | {"num_experts": 128})
    pieces = [piece for parameter in parameters(config).values() for piece in parameter.pieces]
    found, settings = fp8_pieces(pieces)
    gates = [piece for piece in found if piece.hf_name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]
    assert [piece.holds for piece in gates] == ["values"] * 2 and gates[0].shape == (128, 256)
    named = {f"model.layers.0.mlp.{name}" for name in ("gate", "shared_expert_gate")}
    assert named <= set(settings["modules_to_not_convert"])


def test_a_model_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    model = build_model(ModelConfig(**MODEL | {"hidden_size": 64}), seed=3)
    save_pretrained(model, tmp_path / "plain")
    convert_from_hf(tmp_path / "plain", tmp_path / "checkpoint")
    with pytest.raises(UserError, match="multiples of 128"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "fp8", dtype="fp8")
    assert not (tmp_path / "fp8").exists()

"""Hugging Face directories for tests: written by transformers itself, or by hand in the style of older versions."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen_moe.checkpoint.huggingface.command import register
from qwen_moe.models.decoder import DecoderLM
from tests.models.hf_reference import hf_model

SIDE_FILES = {
    "tokenizer.json": b'{"version": "1.0", "added_tokens": [], "model": {"vocab": {"a": 0}}}\n',
    "tokenizer_config.json": b'{"eos_token": "a"}',
    "merges.txt": "\u0120a b\r\n".encode(),
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"\xff\xfe not text",
    "assets/figure.png": bytes(range(256)),
}


def convert(*arguments: object) -> int:
    """Run `qwen-moe convert ...` as the command does."""
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args(["convert", *map(str, arguments)])
    return args.func(args)


def write_side_files(directory: Path) -> None:
    for name, content in SIDE_FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def by_transformers(directory: Path, ours: DecoderLM, dtype: torch.dtype, max_shard_size: str = "5GB") -> None:
    """What transformers' save_pretrained writes, and a few files more."""
    hf_model(ours).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    write_side_files(directory)


def tensors_on_disk(ours: DecoderLM) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face file, experts apart; written without the converter's map."""
    tensors = {}
    for name, tensor in ours.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert in range(tensor.shape[0]):
                base = name.replace("gate_up_proj", str(expert))
                tensors[f"{base}.gate_proj.weight"] = tensor[expert, 0].clone()
                tensors[f"{base}.up_proj.weight"] = tensor[expert, 1].clone()
        elif name.endswith("experts.down_proj"):
            for expert in range(tensor.shape[0]):
                tensors[f"{name.replace('down_proj', str(expert))}.down_proj.weight"] = tensor[expert].clone()
        elif not name.endswith("expert_bias"):
            tensors[name] = tensor.clone()
    return tensors


def old_style_config(ours: DecoderLM, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as transformers 4 wrote it: rope_theta, torch_dtype, num_experts, nulls."""
    config = ours.config
    values: dict[str, Any] = {
        "architectures": [config.features.architecture],
        "vocab_size": config.vocab_size,
        "model_type": config.family,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": 28,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
    }
    if config.features.qkv_bias_key:
        values[config.features.qkv_bias_key] = config.qkv_bias
    if config.is_moe_family:
        values |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers) or None,
        }
    if config.features.shared_expert:
        values |= {"shared_expert_intermediate_size": config.shared_expert_intermediate_size}
    return values


def by_hand(directory: Path, ours: DecoderLM, dtype: torch.dtype, files: int, seed: int = 0) -> None:
    """Tensors dealt at random to ``files`` files with unusual names, old-style config, compact JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(old_style_config(ours, dtype)), encoding="utf-8")
    write_tensors(directory, {name: t.to(dtype) for name, t in tensors_on_disk(ours).items()}, files, seed)
    write_side_files(directory)


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor], files: int, seed: int = 0) -> None:
    """Save with the safetensors library, with an index when there is more than one file."""
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    owner = torch.randint(0, files, (len(tensors),), generator=torch.Generator().manual_seed(seed)).tolist()
    owner[:files] = range(files)
    names = [f"part-{number}.safetensors" for number in range(files)]
    weight_map = {tensor: names[index] for tensor, index in zip(tensors, owner, strict=True)}
    for file in names:
        part = {tensor: tensors[tensor] for tensor, place in weight_map.items() if place == file}
        save_file(part, directory / file, metadata={"format": "pt", "by": "hand"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` and its bytes."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors

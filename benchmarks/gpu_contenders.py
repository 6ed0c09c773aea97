"""What `benchmarks/gpu.py` compares: steps (forward and backward) of our layer and model, and of other libraries'.

Each function builds one contender and returns its step; what is not installed raises, and is listed with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from parallel.kernels.interface import ExpertPart
from parallel.process import process_info, start
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.sharding.build import build_model, make_grids
from qwen_moe.sharding.kernels import choose_kernels
from qwen_moe.sharding.layout import run_layout
from qwen_moe.sharding.model import TrainingPart

Step = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """Of the layer and of the whole model, which has ``layers`` such layers."""

    hidden: int = 2048
    experts: int = 128
    top_k: int = 8
    expert_hidden: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    layers: int = 3
    vocabulary: int = 32768
    batch: int = 4
    sequence: int = 4096

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


TINY = Size(64, 8, 2, 32, 4, 2, 16, 2, 128, 2, 32)


def run_config(size: Size, precision: dict[str, Any]) -> RunConfig:
    """A run whose model has ``size`` and whose products have ``precision``."""
    model = {
        "family": "qwen3_moe",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.expert_hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "num_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "moe_intermediate_size": size.expert_hidden,
        "norm_topk_prob": True,
    }
    values = {
        "run_dir": "unused",
        "model": model,
        "data": {"train": [{"prefix": "unused"}], "sequence_length": size.sequence},
        "training": {
            "train_tokens": size.tokens,
            "micro_batch_size": size.batch,
            "global_batch_size": size.batch,
        },
        "optimizer": {"learning_rate": 1e-4},
        "precision": {"master": "bf16"} | precision,
    }
    return parse_config(values, "benchmark")


def precisions(recipes: list[str]) -> dict[str, dict[str, Any]]:
    """Our contenders: bf16, and each recipe by torch and by Transformer Engine."""
    found: dict[str, dict[str, Any]] = {"ours bf16": {"compute": "bf16"}}
    for recipe in recipes:
        for kernels in ("torch", "te"):
            found[f"ours fp8 {recipe} ({kernels})"] = {
                "compute": "fp8",
                "kernels": kernels,
                "fp8": {"recipe": recipe},
            }
    return found


def routed_tokens(size: Size, routing: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[T, D]`` and a router's weight ``[E, D]`` that together make each token choose as ``routing`` says: the
    first E features of a token are its scores, which the weight picks out."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, top_k = size.tokens, size.experts, size.top_k
    if routing == "balanced":
        chosen = (torch.arange(tokens).unsqueeze(1) * top_k + torch.arange(top_k)) % experts
    else:
        gumbel = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator).clamp(1e-9, 1 - 1e-7)))
        chosen = (gumbel - torch.arange(1, experts + 1).log()).topk(top_k, dim=-1).indices
    x = torch.randn(tokens, size.hidden, generator=generator)
    x[:, :experts] *= 0.1
    x.scatter_add_(1, chosen, torch.full(chosen.shape, 5.0))
    weight = torch.eye(experts, size.hidden)
    return x.to(device, torch.bfloat16), weight.to(device, torch.bfloat16)


def _forward_backward(forward: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, x: torch.Tensor) -> Step:
    x = x.clone().requires_grad_()
    dy = torch.randn_like(x)

    def step() -> None:
        forward(x).backward(dy.view_as(x))
        x.grad = None
        module.zero_grad(set_to_none=True)

    return step


def _draw(module: nn.Module, device: torch.device) -> None:
    for parameter in module.parameters():
        if parameter.numel():
            nn.init.normal_(parameter, std=0.02)


class Session:
    """A process group of one, made once: what Megatron and our plan want, on one device."""

    def __init__(self, device: str) -> None:
        if device == "cpu":
            info = process_info()
            dist.init_process_group("gloo", rank=info.rank, world_size=info.world_size)
            self.device = torch.device("cpu")
        else:
            self.device = start(process_info())

    def parts(self, config: RunConfig) -> tuple[Any, Any]:
        layout = run_layout(config, 1)
        return layout, make_grids(config, layout, self.device)


def our_layer(session: Session, size: Size, precision: dict[str, Any], x: torch.Tensor, router: torch.Tensor) -> Step:
    config = run_config(size, precision)
    kernels = choose_kernels(config, session.parts(config)[1])
    with torch.device(session.device):
        moe = MoE(config.model).to(torch.bfloat16)
    _draw(moe, session.device)
    moe.gate.weight.data.copy_(router)
    part = ExpertPart(total=size.experts, first=0, count=size.experts)
    moe.experts.up_mm = kernels.grouped("experts.gate_up_proj", part) or moe.experts.up_mm
    moe.experts.down_mm = kernels.grouped("experts.down_proj", part) or moe.experts.down_mm
    kernels.materialize(session.device)
    rows = x.view(size.batch, size.sequence, size.hidden)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with kernels.forward():
            return moe(x)[0]

    inner = _forward_backward(forward, moe, rows)

    def step() -> None:
        kernels.begin_step()
        inner()
        kernels.end_step()

    return step


def _hf_config(size: Size) -> Any:
    import transformers

    return transformers.Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.expert_hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        moe_intermediate_size=size.expert_hidden,
        norm_topk_prob=True,
        use_cache=False,
        output_router_logits=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )


def transformers_layer(session: Session, size: Size, x: torch.Tensor, router: torch.Tensor) -> Step:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

    with torch.device(
        session.device
    ):  # a model of one layer: what chooses the experts' implementation is its constructor
        config = _hf_config(size)
        config.num_hidden_layers, config.vocab_size = 1, 8
        block = Qwen3MoeForCausalLM(config).model.layers[0].mlp.to(torch.bfloat16)
    _draw(block, session.device)
    block.gate.weight.data.copy_(router)
    return _forward_backward(block, block, x.view(size.batch, size.sequence, size.hidden))


def megatron_layer(session: Session, size: Size, x: torch.Tensor, router: torch.Tensor) -> Step:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    if session.device.type != "cuda":
        raise RuntimeError("Megatron's layer is for CUDA only")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_moe_experts=size.experts,
        moe_router_topk=size.top_k,
        moe_ffn_hidden_size=size.expert_hidden,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    spec = get_moe_module_spec(use_te=True, num_experts=size.experts, moe_grouped_gemm=True)
    layer = MoELayer(config, spec.submodules, layer_number=1).to(session.device)
    layer.router.weight.data.copy_(router)
    return _forward_backward(lambda x: layer(x)[0], layer, x.view(size.sequence, size.batch, size.hidden))


class TransformerEngineLayer(nn.Module):
    """An MoE layer of Transformer Engine's own parts: its permutation and its grouped linears with their own weights."""

    def __init__(self, te: Any, size: Size, router: torch.Tensor) -> None:
        super().__init__()
        self.te, self.top_k, self.experts = te, size.top_k, size.experts
        self.router = nn.Parameter(router.clone())
        self.te_up = te.GroupedLinear(
            size.experts, size.hidden, 2 * size.expert_hidden, bias=False, params_dtype=torch.bfloat16
        )
        self.te_down = te.GroupedLinear(
            size.experts, size.expert_hidden, size.hidden, bias=False, params_dtype=torch.bfloat16
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        te = self.te
        weights, indices = F.linear(x.float(), self.router.float()).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        rows, row_map = te.moe_permute(x, indices.to(torch.int32), indices.numel(), map_type="index")
        splits = torch.bincount(indices.flatten(), minlength=self.experts).tolist()
        gate, up = self.te_up(rows, splits).chunk(2, dim=-1)
        rows = self.te_down(F.silu(gate) * up, splits)
        return te.moe_unpermute(rows, row_map, merging_probs=weights, map_type="index")


def transformer_engine_layer(session: Session, size: Size, x: torch.Tensor, router: torch.Tensor) -> Step:
    from parallel.kernels.transformer_engine import load_transformer_engine

    layer = TransformerEngineLayer(load_transformer_engine()[0], size, router)
    return _forward_backward(layer, layer, x)


def _without_losses(
    part: TrainingPart, out: torch.Tensor, router: RouterStatistics, labels: torch.Tensor, counted: torch.Tensor | None
) -> torch.Tensor:
    return out


def our_model(session: Session, size: Size, precision: dict[str, Any]) -> Step:
    config = run_config(size, precision)
    layout, grids = session.parts(config)
    model = build_model(config, layout, grids, session.device)
    part = model.parts[0]
    part.attach = _without_losses  # router statistics are collected, as in training
    ids = torch.randint(0, size.vocabulary, (size.batch, size.sequence), device=session.device)

    def step() -> None:
        model.kernels.begin_step()
        (part(ids, ids).sum() / ids.numel()).backward()
        model.kernels.end_step()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def transformers_model(session: Session, size: Size) -> Step:
    import transformers

    with torch.device(session.device):
        model = transformers.Qwen3MoeForCausalLM(_hf_config(size)).to(torch.bfloat16)
    ids = torch.randint(0, size.vocabulary, (size.batch, size.sequence), device=session.device)

    def step() -> None:
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step

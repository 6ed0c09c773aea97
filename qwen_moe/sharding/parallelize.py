"""Makes a stage module parallel by swapping its submodules."""

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

from parallel.kernels.interface import ExpertPart, Kernels, swap
from parallel.mesh import Grids
from parallel.sequence import SequenceShard
from parallel.tensor import RowParallelLinear, VocabParallelEmbedding, split_range
from parallel.vocab_head import vocab_parallel_cross_entropy, vocab_parallel_log_probs
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.norm import RMSNorm
from qwen_moe.sharding.dispatcher import AllToAllDispatcher
from qwen_moe.sharding.table import Placement, placement


def _ask_for_kernels(path: str, module: nn.Module, kernels: Kernels, grids: Grids) -> None:
    """Let ``kernels`` replace the matmuls and norms of one block. Router, embedding and head always stay the model's own."""
    if isinstance(module, Attention):
        module.project = kernels.column(path, module, ("q_proj", "k_proj", "v_proj")) or module.project
        kernels.row(path, module, "o_proj")
    elif isinstance(module, FeedForward):
        module.project = kernels.column(path, module, ("gate_proj", "up_proj")) or module.project
        kernels.row(path, module, "down_proj")
        if type(module.down_proj) is RowParallelLinear:
            module.summed = module.down_proj.summed
    elif isinstance(module, Experts):
        total = module.down_proj.shape[0]
        first, count = split_range(total, grids.ep)
        experts = ExpertPart(total=total, first=first, count=count)
        module.up_mm = kernels.grouped(f"{path}.gate_up_proj", experts) or module.up_mm
        module.down_mm = kernels.grouped(f"{path}.down_proj", experts) or module.down_mm
    for name, child in list(module.named_children()):
        if isinstance(child, RMSNorm):
            kernels.norm(path, module, name)


def parallelize(part: DecoderLM, grids: Grids, kernels: Kernels, plain_layers: Collection[int]) -> dict[str, Placement]:
    """Cut stage module ``part`` (on the meta device) to this rank's shards and swap in parallel modules. ``kernels``
    supplies matmuls and norms, except in ``plain_layers``. Returns placements by parameter name."""
    config, tp = part.config, grids.tp
    placements = {name: placement(name, p.shape, grids) for name, p in part.named_parameters()}
    sequence = SequenceShard.of(grids)
    part.sequence = sequence
    if tp.size > 1:
        if hasattr(part.model, "embed_tokens"):
            embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, device="meta")
            embedding.axis, embedding.first = tp, placements["model.embed_tokens.weight"].offsets[0]
            swap(part.model, "embed_tokens", embedding)
        if part.last and not config.criteria:
            head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            first = placements[head].offsets[0]
            part.cross_entropy = partial(vocab_parallel_cross_entropy, first=first, axis=tp)
            part.log_probs = partial(vocab_parallel_log_probs, first=first, axis=tp)
    plain = Kernels(tp)
    for layer in part.model.layers:
        index = layer.self_attn.layer
        chosen = plain if index in plain_layers else kernels
        for name, module in list(layer.named_modules(prefix=f"model.layers.{index}")):
            _ask_for_kernels(name, module, chosen, grids)
            if isinstance(module, MoE):
                module.sequence = sequence
                if grids.exchange.size > 1:
                    module.dispatcher = AllToAllDispatcher(grids, config.num_experts)
    for name, place in placements.items():
        path, _, leaf = name.rpartition(".")
        module = part.get_submodule(path)
        old = module.get_parameter(leaf)
        setattr(module, leaf, nn.Parameter(torch.empty(place.sizes, dtype=old.dtype, device="meta")))
    return placements

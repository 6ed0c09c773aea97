"""Which experts each token took while an answer was sampled, so that training can use the same (`qwen_moe.data.replay`).

Shapes: N tokens of a forward pass, n tokens of a sequence, L MoE layers of the whole model in order, l of them on this rank,
K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen_moe.data.replay import UNKNOWN
from qwen_moe.models.decoder import DecoderLM


@dataclass(frozen=True)
class Routing:
    """The experts of every token of an answer and its prompt that was read: of all but the answer's last, which no token
    follows. int16, on the CPU. Answers to one prompt share the tensor of the prompt.

    In the last layer of the model, those of a prompt's tokens are UNKNOWN, except its last token's: generation does not
    compute them, because nothing that is drawn depends on them. No log-probability of the answer does in training either;
    there the router selects for these tokens, and they are in the statistics of balance.
    """

    prompt: torch.Tensor  # [n, L, K]
    answer: torch.Tensor  # [n - 1, L, K] of n tokens drawn

    def whole(self) -> torch.Tensor:
        """``[n, L, K]`` of all tokens, in order."""
        return torch.cat([self.prompt, self.answer])


def experts_of_pass(
    model: DecoderLM, chosen: Sequence[torch.Tensor], wanted: torch.Tensor, tokens: int
) -> torch.Tensor:
    """The experts ``[N, l, K]``, int16, on the CPU, of ``tokens`` tokens that ``model`` (a stage or all of it) has read.

    ``chosen``: what `DecoderLM.read` gave, of all N tokens; of the model's last layer it may be of the tokens ``wanted``
    alone. There only these are known, whichever tokens were computed, so that the layout changes nothing.
    """
    config = model.config
    layers = [layer.self_attn.layer for layer in model.model.layers if layer.is_moe]
    shape = tokens, len(layers), config.num_experts_per_tok
    found = torch.full(shape, UNKNOWN, dtype=torch.int16, device=wanted.device)
    for place, (layer, experts) in enumerate(zip(layers, chosen, strict=False)):  # the last may have computed nothing
        known = experts.to(torch.int16)
        if layer < config.num_hidden_layers - 1:
            found[:, place] = known
        else:
            found[wanted, place] = known if len(known) == len(wanted) else known[wanted]
    return found.cpu()


def split_routing(whole: torch.Tensor, sizes: Sequence[int]) -> list[Routing]:
    """The routing of each answer, from the experts of a prompt and of its answers, ``sizes`` tokens each, one after
    another."""
    prompt, *answers = (
        part.clone() for part in whole.split(list(sizes))
    )  # a view would be sent with all it is a part of
    return [Routing(prompt, answer) for answer in answers]

"""Losses and gradients against TRL's own code, where TRL is installed (`pip install trl==1.16.0`; it is not among our
requirements). Its trainers' loss functions run on given log-probabilities in float64, without a model."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from qwen_moe.config.objective import PolicyConfig, PreferenceConfig, RewardConfig
from qwen_moe.objectives.policy import Policy
from qwen_moe.objectives.preference import Preference
from qwen_moe.objectives.reward import RewardModel
from tests.objectives import test_policy, test_preference, test_reward
from tests.objectives.packing import mean_loss, plain

pytest.importorskip("trl")


def padded(rows: list[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def trainer(**attributes: Any) -> MagicMock:
    """What TRL's loss functions ask of their trainer; everything else answers with a mock."""
    found = MagicMock(**attributes, aux_loss_enabled=False)
    found.accelerator.device = torch.device("cpu")
    found.accelerator.gather_for_metrics = found.accelerator.gather = lambda x: x
    found.accelerator.num_processes = 1
    found.model.training = False
    return found


def compare(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (ours, theirs)]
    for mine, other, mask in zip(*gradients, masks, strict=True):
        torch.testing.assert_close(mine[mask], other[mask], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("loss_type", "config"),
    [
        ("sigmoid", PreferenceConfig(beta=0.3)),
        ("sigmoid_norm", PreferenceConfig(beta=2.0, length_normalized=True)),
        ("ipo", PreferenceConfig(beta=0.2, loss="ipo", length_normalized=True)),
    ],
)
def test_dpo(loss_type: str, config: PreferenceConfig) -> None:
    from trl import DPOTrainer

    items = test_preference.pairs()
    answers = [pair[which] for which in (0, 1) for pair in items]
    masks = [answer["labels"] >= 0 for answer in answers]
    leaves = [answer["log_probs"] for answer in answers]
    log_probs = padded([x.where(mask, 0.0) for x, mask in zip(leaves, masks, strict=True)])
    reference = [answer["reference_log_probs"].nan_to_num(0.0).sum() for answer in answers]
    mask = padded([m.long() for m in masks])
    outputs = SimpleNamespace(log_probs=log_probs, entropy=log_probs, mean_logits=log_probs, logits=log_probs)
    outputs.is_top1 = torch.ones_like(mask, dtype=torch.bool)
    theirs = trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=config.beta, use_weighting=False
    )
    theirs.loss_types, theirs.loss_weights = [loss_type], [1.0]
    inputs = {
        "input_ids": torch.zeros(len(answers), mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.ones(len(answers), mask.shape[1] + 1),
        "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
        "ref_chosen_logps": torch.stack(reference[: len(items)]),
        "ref_rejected_logps": torch.stack(reference[len(items) :]),
    }
    loss = DPOTrainer._compute_loss(theirs, lambda **_: outputs, inputs, return_outputs=False)
    compare(mean_loss(Preference(config), items, plain(len(items)))[0], loss, leaves, masks)


@pytest.mark.parametrize(
    ("loss_type", "level", "config"),
    [
        ("grpo", "token", PolicyConfig()),
        ("grpo", "token", PolicyConfig(clip_high=0.4, kl="k3", kl_coefficient=0.3)),
        ("dr_grpo", "token", PolicyConfig(normalization="dr_grpo", longest=20, kl="rho_k3", kl_coefficient=0.2)),
        ("dapo", "token", PolicyConfig(normalization="dapo", clip_high=0.28)),
        ("grpo", "sequence", PolicyConfig(ratio="sequence", clip_low=0.05, clip_high=0.05)),
    ],
)
def test_grpo(loss_type: str, level: str, config: PolicyConfig) -> None:
    from trl import GRPOTrainer

    items = test_policy.responses(config, left_out=False)
    documents = [item[0] for item in items]
    masks = [document["labels"] >= 0 for document in documents]
    leaves = [document["log_probs"] for document in documents]

    def field(name: str) -> torch.Tensor:
        return padded([d[name].where(mask, 0.0) for d, mask in zip(documents, masks, strict=True)])

    mask = padded([m.long() for m in masks])
    theirs = trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=config.kl_coefficient,
        loss_type=loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        use_vllm=False,
        max_completion_length=config.longest,
        _entropy_bonus_enabled=False,
    )
    theirs.args.use_bias_correction_kl, theirs.args.delta = config.kl == "rho_k3", None
    log_probs = field("log_probs")
    theirs._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None)
    inputs = {
        "prompt_ids": torch.zeros(len(items), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(items), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.stack([document["advantages"][0] for document in documents]),
        "old_per_token_logps": field("old_log_probs"),
        "ref_per_token_logps": field("reference_log_probs"),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(theirs, MagicMock(), inputs)
    compare(mean_loss(Policy(config), items, plain(len(items)))[0], loss, leaves, masks)


def test_reward_model() -> None:
    from trl import RewardTrainer

    items = test_reward.pairs()
    for pair in items:
        for document, sign in zip(pair, (1.0, -1.0), strict=True):
            document["scores"] = document["scores"].detach()[:, :1].requires_grad_()
            document["preferences"] = torch.zeros(len(document["labels"]), 1)
            document["preferences"][-1] = sign
    answers = [pair[which] for which in (0, 1) for pair in items]
    leaves = [answer["scores"] for answer in answers]
    outputs = SimpleNamespace(logits=torch.stack([scores[-1] for scores in leaves]))
    theirs = trainer()
    theirs.args.center_rewards_coefficient = 0.01
    loss = RewardTrainer.compute_loss(theirs, lambda **_: outputs, {"attention_mask": torch.ones(10, 5)})
    ours, _ = mean_loss(RewardModel(RewardConfig(center=0.01)), items, plain(len(items)), "scores")
    compare(ours, loss, leaves, [torch.ones(len(x), dtype=torch.bool) for x in leaves])

"""The experts that generation reports are those that the training forward chooses for the same tokens."""

import pickle
from typing import Any

import pytest
import torch

from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Completion, Engine, Limits
from qwen_moe.generation.runner import LocalRunner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.moe.router import Router
from tests.models.hf_reference import draw_weights
from tests.small import small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4], [7, 7], [3, 1, 4, 1, 5]]
SAMPLING = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, samples=2, seed=3)


def config(**changes: Any) -> ModelConfig:
    return small_model(max_position_embeddings=64, num_hidden_layers=3, vocab_size=61, **changes)


def generate(
    model: DecoderLM,
    routing: bool = True,
    sampling: Sampling = SAMPLING,
    ends: tuple[int, ...] = (2, 11),
    **limits: int,
) -> list[list[Completion]]:
    engine = Engine(LocalRunner(model), model.config, end_tokens=ends, limits=Limits(**limits))
    return engine.generate(PROMPTS, sampling, routing=routing)


@torch.no_grad()
def chosen_in_training(model: DecoderLM, tokens: list[int]) -> torch.Tensor:
    """The experts ``[n, L, K]`` of a whole text, read at once without a cache."""
    found: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda _, inputs, out: found.append(out[1])) for router in routers]
    model.hidden_states(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1)


def check(model: DecoderLM, prompt: list[int], answer: Completion, last_layer_is_moe: bool = True) -> None:
    expected = chosen_in_training(model, [*prompt, *answer.tokens])[:-1].to(torch.int16)
    if last_layer_is_moe:
        expected[: len(prompt) - 1, -1] = -1
    assert answer.routing is not None and torch.equal(answer.routing.whole(), expected)
    assert len(answer.routing.prompt) == len(prompt) and answer.routing.answer.dtype == torch.int16


LIMITS: dict[str, dict[str, int]] = {
    "all at once": {},
    "prompts in pieces": {"chunk": 4},
    "one token a pass": {"chunk": 1},
    "one prompt at a time": {"sequences": 2},
    "pieces and small batches": {"chunk": 3, "sequences": 4},
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_routing_is_that_of_the_training_forward(name: str) -> None:
    model = draw_weights(config(), 4).eval()
    lengths = set()
    for prompt, answers in zip(PROMPTS, generate(model, **LIMITS[name]), strict=True):
        for answer in answers:
            check(model, prompt, answer)
            lengths.add(len(answer.tokens))
    assert len(lengths) > 2  # answers that end while others go on


@pytest.mark.parametrize("dense", [[0], [1], [2]])
def test_dense_layers_are_no_rows(dense: list[int]) -> None:
    model = draw_weights(config(mlp_only_layers=dense), 4).eval()
    for prompt, (answer, _) in zip(PROMPTS, generate(model, chunk=4), strict=True):
        check(model, prompt, answer, last_layer_is_moe=dense != [2])


def test_an_answer_of_one_token_has_only_its_prompts_routing() -> None:
    for prompt, (answer, _) in zip(
        PROMPTS, generate(draw_weights(config(), 4).eval(), sampling=Sampling(max_new_tokens=1, samples=2)), strict=True
    ):
        assert answer.routing is not None
        assert answer.routing.answer.shape == (0, 3, 2) and len(answer.routing.whole()) == len(prompt)


def test_what_is_drawn_does_not_depend_on_being_asked() -> None:
    model = draw_weights(config(), 4).eval()
    asked, plain = generate(model), generate(model, routing=False)
    assert asked == plain
    assert all(answer.routing is None for answers in plain for answer in answers)


def test_nothing_is_collected_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_moe.generation import engine, runner

    def unexpected(*arguments: Any) -> None:
        raise AssertionError("collected")

    monkeypatch.setattr(runner, "experts_of_pass", unexpected)
    monkeypatch.setattr(engine, "split_routing", unexpected)
    model = draw_weights(config(), 4).eval()
    generate(model, routing=False)
    with pytest.raises(AssertionError, match="collected"):
        generate(model)


def test_samples_share_their_prompts_routing() -> None:
    for answers in generate(draw_weights(config(), 4).eval()):
        one, other = (answer.routing for answer in answers)
        assert one is not None and other is not None and one.prompt is other.prompt
        alone = len(pickle.dumps([one])) + len(pickle.dumps([other.answer]))
        assert len(pickle.dumps([one, other])) < alone + 200  # what ranks send: the prompt's once, and no more than it
        assert one.prompt.untyped_storage().nbytes() == one.prompt.nbytes


def test_a_dense_model_has_no_routing() -> None:
    with pytest.raises(UserError, match="a model without experts has no routing"):
        generate(draw_weights(small_model("qwen3", vocab_size=61), 1).eval())

"""Likelihoods of continuations against transformers, whatever else is in the pass and in every layout."""

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Grids, Layout
from qwen_moe.checkpoint.tensor_store import ModuleTensors
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Engine
from qwen_moe.generation.likelihood import Likelihood, ScoredText, check_text, in_passes
from qwen_moe.generation.ranks import ShardedRunner, gather_shares, load_sharded
from qwen_moe.generation.runner import LocalRunner
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights, hf_model, true_float64
from tests.small import small_model

CONFIG = small_model(max_position_embeddings=64, num_hidden_layers=3, vocab_size=61)
TEXTS = [
    ScoredText([1, 2, 3], 1),
    ScoredText([4, 4], 1),
    ScoredText([5, 6, 7, 8, 9, 1, 2, 3, 4], 8),
    ScoredText([7, 7, 1, 60, 0, 2], 3),
    ScoredText([3, 1, 4, 1, 5], 2),
]


def reference() -> list[Likelihood]:
    """By transformers, one text at a time."""
    with true_float64(), torch.no_grad():
        model = hf_model(draw_weights(CONFIG, 4))
        outputs = [model(torch.tensor([text.tokens])).logits[0] for text in TEXTS]
    found = []
    for text, output in zip(TEXTS, outputs, strict=True):
        ids, logits = torch.tensor(text.tokens), output[:-1][-text.scored :]
        labels = ids[-text.scored :]
        log_probs = logits.log_softmax(-1).gather(1, labels.unsqueeze(1))
        found.append(Likelihood(float(log_probs.sum()), torch.equal(logits.argmax(-1), labels)))
    return found


def assert_equal(found: list[Likelihood], expected: list[Likelihood]) -> None:
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    assert [one.log_prob for one in found] == pytest.approx([one.log_prob for one in expected], rel=0, abs=1e-10)


def local() -> Engine:
    return Engine(LocalRunner(draw_weights(CONFIG, 4).eval()), CONFIG)


def greedy_text() -> ScoredText:
    """A text that greedy decoding continues like this."""
    with torch.no_grad():
        model = draw_weights(CONFIG, 4).eval()
        tokens = [9, 8, 7]
        for _ in range(4):
            states, _ = model.hidden_states(torch.tensor([tokens]))
            tokens.append(int((states[0, -1] @ model.head_weight.T).argmax()))
    return ScoredText(tokens, 4)


def test_likelihoods_are_those_of_transformers() -> None:
    assert_equal(local().likelihoods(TEXTS), reference())


def test_greedy_means_that_greedy_decoding_gives_the_tokens() -> None:
    text = greedy_text()
    wrong = ScoredText([*text.tokens[:-1], (text.tokens[-1] + 1) % 61], 4)
    assert [one.greedy for one in local().likelihoods([text, wrong])] == [True, False]


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[::-1], TEXTS[2:3], [ScoredText([5, 6], 1), ScoredText([6, 5], 1)]])
def test_nothing_else_in_the_pass_counts(texts: list[ScoredText]) -> None:
    """Also where every token that is read is scored, so that the last layer computes all."""
    engine = local()
    assert_equal(engine.likelihoods(texts), [engine.likelihoods([text])[0] for text in texts])


def test_logits_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.generation.likelihood._ROWS", 3)
    assert_equal(local().likelihoods(TEXTS), reference())


def test_passes_hold_all_texts_once() -> None:
    lengths = [3, 9, 1, 5, 20, 2]
    plan = in_passes(lengths, 10)
    assert sorted(i for batch in plan for i in batch) == list(range(6)) and plan[0] == [4]
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 10 for batch in plan) and len(plan) == 4


@pytest.mark.parametrize(
    ("tokens", "message"), [([1, 61], "token 61 .* vocabulary has 61"), ([0] * 66, "65 tokens is longer than the 64")]
)
def test_texts_that_the_model_does_not_read(tokens: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_text(ScoredText(tokens, 1), 61, 64)
    check_text(ScoredText([1] * 65, 1), 61, 64)


def _in_layout(layout: Layout) -> list[Likelihood]:
    grids = Grids(layout, "cpu", kv_heads=CONFIG.num_key_value_heads)
    source = ModuleTensors(draw_weights(CONFIG, 4))
    model = load_sharded(CONFIG, source, grids, torch.float64, torch.device("cpu"), "the test")
    runner = ShardedRunner(model, grids, torch.device("cpu"))
    engine = Engine(runner, CONFIG)
    found = [engine.likelihoods([text])[0] for text in runner.share_of(TEXTS)]
    runner.finish()
    dist.barrier()
    return gather_shares(found, grids, len(TEXTS))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2, ep=2), Layout(pp=2, tp=2, ep=2)], ids=str)
def test_layouts_find_what_one_process_finds(layout: Layout) -> None:
    expected = local().likelihoods(TEXTS)
    for found in run_distributed(_in_layout, layout.world_size, layout):
        assert_equal(found, expected)

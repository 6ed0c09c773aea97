"""Backward in two halves, as zbv and dualpipev run it: the gradients of activations, and later those of weights.

Torch tells a custom autograd function that all its gradients are needed in both (pytorch #174017), so that every product
would be computed twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import tensor
from parallel.gemm import linears, wanted
from parallel.kernels import fp8_layers
from parallel.kernels.interface import ExpertPart
from parallel.mesh import Grids, Layout
from parallel.stages import splits_backward
from parallel.vocab_head import vocab_parallel_cross_entropy, vocab_parallel_log_probs
from qwen_moe.config.families import FAMILIES
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.recompute import once
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights
from tests.parallel.kernels.providers import RECIPES, provider
from tests.small import VOCAB, small_model

pytestmark = pytest.mark.skipif(
    not splits_backward(), reason="this torch cannot split backward of our functions (2.13 can)"
)
Work = Counter[str]
Loss = Callable[[torch.Tensor], torch.Tensor]


class Products(TorchDispatchMode):
    """Counts the matrix products that run in it, by name and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Work = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if "mm" in name or name in ("linear", "mv", "addmv"):
            self.found[f"{name} {[tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]}"] += 1
        return func(*args, **(kwargs or {}))


def whole_and_halves(
    loss: Loss, x: torch.Tensor, weights: Sequence[torch.Tensor]
) -> list[tuple[list[torch.Tensor], Work]]:
    """The gradients of ``x`` and ``weights`` and the products that they took, from one backward and from two halves."""
    results = []
    for halves in (False, True):
        leaf = x.detach().requires_grad_()
        for weight in weights:
            weight.grad = None
        value = loss(leaf)
        with Products() as products:
            if halves:
                (dx,), groups = stage_backward_input([value], None, [leaf], iter(weights))
                assert all(weight.grad is None for weight in weights)
                stage_backward_weight(iter(weights), groups)
            else:
                (dx,) = stage_backward(value, None, [leaf])
        found = [dx, *(weight.grad for weight in weights)]
        assert all(one is not None and one.abs().sum() > 0 for one in found)
        results.append((found, products.found))
    return results


def equal(loss: Loss, x: torch.Tensor, weights: Sequence[torch.Tensor], more: int = 0) -> None:
    """Halves give the gradients of one backward by as many products; ``more`` are known to be computed again."""
    (whole, once), (halves, twice) = whole_and_halves(loss, x, weights)
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)
    assert once and sum((twice - once).values()) == more and not once - twice


def states(dtype: torch.dtype, size: int = 16) -> torch.Tensor:
    return torch.randn(2, 8, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def model_of(family: str, dtype: torch.dtype, **changes: Any) -> DecoderLM:
    """The last two of three layers, with norm and head."""
    whole = draw_weights(small_model(family, num_hidden_layers=3, **changes), 3, dtype)
    part = DecoderLM(whole.config, layers=[1, 2]).to(dtype)
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in part.state_dict()})
    return part.train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_layers_multiply_once(family: str, dtype: torch.dtype) -> None:
    part = model_of(family, dtype)

    def loss(x: torch.Tensor) -> torch.Tensor:
        y, router = part.hidden_states(x)
        total = (y.to(torch.float64) * states(torch.float64)).sum()
        return total if router is None else total + router.prob_sum[..., 0].sum() + router.z_sum.sum()

    equal(loss, states(dtype), [weight for name, weight in part.named_parameters() if "head" not in name])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_recomputed_is_recomputed_once(recompute: Any) -> None:
    """torch's checkpoint would compute a layer again for each group of weights."""
    kept, part = model_of("qwen2_moe", torch.float64), model_of("qwen2_moe", torch.float64)
    part.recompute, part.backward_in_halves = recompute, True

    def results(model: DecoderLM) -> list[tuple[list[torch.Tensor], Work]]:
        def loss(x: torch.Tensor) -> torch.Tensor:
            y, router = model.hidden_states(x)
            assert router is not None
            return (y * states(torch.float64)).sum() + router.z_sum.sum()

        return whole_and_halves(
            loss, states(torch.float64), [w for n, w in model.named_parameters() if "head" not in n]
        )

    (expected, least), _ = results(kept)
    (whole, once), (halves, twice) = results(part)
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
    torch.testing.assert_close(halves, expected, rtol=0, atol=0)
    assert once == twice and least < once
    part.backward_in_halves = False
    assert sum(results(part)[1][1].values()) > 2 * sum(once.values())


@pytest.mark.parametrize("head", ["cross_entropy", "log_probs", "scores"])
def test_heads_multiply_once(head: str) -> None:
    criteria = {"criteria": ("good", "short")} if head == "scores" else {}
    part = model_of("qwen2", torch.float64, **criteria)
    labels = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))

    def loss(x: torch.Tensor) -> torch.Tensor:
        y, _ = part.hidden_states(x)
        if head == "scores":
            return part.scores(y).square().sum()
        if head == "cross_entropy":
            return part.cross_entropy(y, part.head_weight, labels, 8)
        return part.log_probs(y, part.head_weight, labels, 8).square().sum()

    # Both gradients need the logits, which log_probs does not keep: two chunks of them.
    equal(loss, states(torch.float64), list(part.parameters()), more=2 if head == "log_probs" else 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_products_run_once(recipe: str) -> None:
    kernels = provider(recipe)
    generator = torch.Generator().manual_seed(3)
    parent = nn.Module()
    parent.up = nn.Linear(128, 256, bias=True)
    experts = nn.Parameter(torch.randn(2, 128, 256, generator=generator))
    project = kernels.column("block", parent, ["up"])
    matmul = kernels.grouped("experts", ExpertPart(total=2, first=0, count=2))
    kernels.materialize(torch.device("cpu"))
    assert project is not None and matmul is not None
    kernels.begin_step()

    def loss(x: torch.Tensor) -> torch.Tensor:
        (y,) = project(x, parent.up)
        return matmul(y.flatten(0, 1), experts, torch.tensor([9, 7])).square().mean()

    x = torch.randn(2, 8, 128, generator=generator)
    equal(loss, x, [parent.up.weight, parent.up.bias, experts])


@contextmanager
def noted_messages(module: Any) -> Iterator[list[str]]:
    """The collectives that ``module`` begins meanwhile, by name."""
    sent: list[str] = []
    kept = {name: getattr(module, name) for name in ("start_gather_sequence", "start_reduce_scatter_sequence")}

    def noted(name: str) -> Callable[..., Any]:
        return lambda *args: (sent.append(name), kept[name](*args))[1]

    for name in kept:
        setattr(module, name, noted(name))
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


def tensor_parallel() -> list[list[Any]]:
    tp = Grids(Layout(tp=2), "cpu").tp
    generator = torch.Generator().manual_seed(4 + tp.index)
    up, vocabulary = nn.Linear(16, 12).double(), nn.Parameter(torch.randn(8, 16, generator=generator).double())
    down = tensor.RowParallelLinear(12, 16).double()
    down.axis = tp
    labels = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(5))
    results = []
    with noted_messages(tensor) as sent:
        for head in (vocab_parallel_cross_entropy, vocab_parallel_log_probs):

            def loss(x: torch.Tensor, head: Any = head) -> torch.Tensor:
                (h,) = tensor.column_parallel(tp, x, up)
                y = down(torch.relu(h))
                value = head(y, vocabulary, labels, 8, first=8 * tp.index, axis=tp).square().sum()
                sent.clear()  # of forward
                return value

            for gradients, products in whole_and_halves(
                loss,
                torch.randn(2, 4, 16, generator=generator).double(),
                [*up.parameters(), *down.parameters(), vocabulary],
            ):
                results.append([gradients, sorted(products.items()), sorted(sent)])
    return results


def test_tensor_parallel_layers_multiply_and_send_once() -> None:
    for results in run_distributed(tensor_parallel, 2):
        for whole, halves in (results[:2], results[2:]):
            torch.testing.assert_close(halves[0], whole[0], rtol=0, atol=0)
            assert halves[2] == whole[2] == ["start_gather_sequence", "start_reduce_scatter_sequence"]
        assert results[0][1] == results[1][1]


def fp8_tensor_parallel(recipe: str) -> list[list[Any]]:
    tp = Grids(Layout(tp=2), "cpu").tp
    kernels = provider(recipe, tp=tp)
    generator = torch.Generator().manual_seed(6 + tp.index)
    parent = nn.Module()
    parent.up, parent.down = nn.Linear(128, 128), nn.Linear(128, 128)
    project = kernels.column("block", parent, ["up"])
    kernels.row("block", parent, "down")
    kernels.materialize(torch.device("cpu"))
    down = parent.down.to_empty(device="cpu")
    with torch.no_grad():
        for weight in parent.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    assert project is not None
    results = []
    with noted_messages(fp8_layers) as sent:

        def loss(x: torch.Tensor) -> torch.Tensor:
            (h,) = project(x, parent.up)
            sent.clear()  # of forward
            return down(torch.relu(h)).square().mean()

        x = torch.randn(2, 64, 128, generator=generator)
        for gradients, products in whole_and_halves(loss, x, list(parent.parameters())):
            results.append([gradients, sorted(products.items()), sorted(sent)])
    return results


@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_parallel_fp8_layers_multiply_and_send_once(recipe: str) -> None:
    for whole, halves in run_distributed(fp8_tensor_parallel, 2, recipe):
        torch.testing.assert_close(halves[0], whole[0], rtol=0, atol=0)
        assert halves[1:] == whole[1:]
        assert halves[2] == ["start_gather_sequence", "start_reduce_scatter_sequence"]


_SEEN: list[tuple[bool, ...]] = []


class _Noting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        return sum(one.sum() for one in arguments if isinstance(one, torch.Tensor))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _SEEN.append(wanted(ctx))
        return tuple(torch.ones(2) if one else None for one in _SEEN[-1])


def test_what_is_wanted() -> None:
    """Arguments that are no tensors, are frozen, are leaves, or are computed; gradients of all and of some."""
    leaf, other, frozen = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(2)
    computed = other * 2
    for inputs, expected in (
        (None, (True, False, False, True)),
        ([leaf], (True, False, False, False)),
        ([other], (False, False, False, True)),
        ([computed], (False, False, False, True)),
        ([leaf, other], (True, False, False, True)),
    ):
        value = _Noting.apply(leaf, None, frozen, computed)
        if inputs is None:
            value.backward(retain_graph=True)
        else:
            torch.autograd.grad(value, inputs, retain_graph=True)
        assert _SEEN[-1] == expected, inputs


def test_one_input_that_is_a_leaf() -> None:
    """A stage whose input goes straight into a product."""
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    equal(lambda x: linears(x, *parameters)[0].square().sum(), states(torch.float64, 4), parameters)


@pytest.mark.parametrize(
    ("again", "same"),
    [
        (lambda x: (x * 2).sum(), 0),  # fewer tensors
        (lambda x: (x.exp() * x[:1]).sum(), 1),  # another shape, as rows of another routing have
        (lambda x: (x.exp() * x.float()).sum(), 1),
    ],
)
def test_a_call_that_is_not_the_same_again_is_noticed(again: Loss, same: int) -> None:
    calls: list[Loss] = [lambda x: (x.exp() * x).sum(), again]
    value = once(lambda x: calls.pop(0)(x), torch.ones(2, dtype=torch.float64, requires_grad=True))
    with pytest.raises(RuntimeError, match=f"a layer saved {same} of the 3 tensors of its forward"):
        value.backward()


def test_a_call_that_fails_again_is_made_once_more() -> None:
    """An error in the middle, such as too little memory, leaves no part of the tensors behind."""
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        y = x.exp()
        if len(calls) == 2:
            raise MemoryError
        return (y * x).sum()

    x = torch.ones(2, requires_grad=True)
    value = once(function, x)
    with pytest.raises(MemoryError):
        value.backward()
    value.backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().exp())

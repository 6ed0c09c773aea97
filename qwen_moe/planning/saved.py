"""Activations of layers for any split, micro-batch and length, from few recorded runs (`counting`).

Two parts of a layer are recorded apart: the layer without its attention core, once for each (tp, etp, experts split or not),
and the core alone, once for each number of heads and kind of context parallelism. The kind changes nothing but the core.
From the recorded sizes, those of any micro-batch and length follow (`tape`). The embedding and the head are counted for two
numbers of tokens; their bytes grow in proportion beyond. `tests/planning/test_saved.py` compares this with whole layers
counted at their own sizes, `test_memory.py` and `test_context.py` with whole models under FSDP2 and with real tensors.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from parallel.kernels.quantizer import BLOCK
from qwen_moe.config import RunConfig
from qwen_moe.planning.counting import Body, Core, Run, Saved, Split, count, record_body, record_core
from qwen_moe.planning.tape import FINEST, NOTHING, Bytes, NotProportional, Padded, Scale, plus, prime_without
from qwen_moe.sharding.build import DTYPES

_BATCH = 101  # sequences of a recorded run, or somewhat more
_CHUNKS = 2  # of tokens, in the head: more of them hold no more


def _smallest_factor(number: int) -> int:
    """The smallest divisor above 1; 1 for 1."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


class SavedActivations:
    """Activations of ``config``'s layers in ``precision``, recorded when they are first needed. ``known``: recordings to
    share with those in another precision; attention's cores and the ends of the model are the same in FP8 as in bf16."""

    def __init__(
        self, config: RunConfig, precision: str = "bf16", known: dict[tuple[object, ...], Any] | None = None
    ) -> None:
        self.config, self.model, self.precision = config, config.model, precision
        self._plain = "bf16" if precision == "fp8" else precision
        self._known: dict[tuple[object, ...], Any] = {} if known is None else known
        self.sequence = config.data.sequence_length
        # Tokens that share a factor.
        self.block = BLOCK.get(config.precision.fp8.recipe, 1) if precision == "fp8" else 1
        self._sizes = tuple(value for value in vars(config.model).values() if isinstance(value, int))
        self._found: dict[Run, Saved] = {}
        self._shared: dict[Run, int] = {}
        # A layer of each kind (MoE or not), to count in the middle of a model.
        self._middle = {self.model.is_moe_layer(i): i for i in range(self.model.num_hidden_layers)}

    def hidden(self, split: Split) -> int:
        """Bytes of a rank's hidden states of one sequence, as layers and stages pass them on."""
        return self._given(split) // split.tp * self.model.hidden_size * DTYPES[self.precision].itemsize

    def _given(self, split: Split) -> int:
        return self.sequence // split.cp

    def _run(self, split: Split, *layers: int, micro_batch: int = 1) -> Run:
        given = self._given(split)
        return Run(split=split, given=given, layers=layers, micro_batch=micro_batch, precision=self.precision)

    # What callers ask for

    def shared(self, split: Split, micro_batch: int = 1) -> float:
        """Bytes that a stage module holds once for all its layers, which do not depend on the precision."""
        layer = next(iter(self._middle.values()))
        run = self._run(Split(tp=split.tp), layer, micro_batch=micro_batch)
        run = replace(run, given=self._given(split), middle=True, forward_only=True, precision=self._plain)
        if run not in self._shared:
            one, two = self._body(run), self._body(replace(run, layers=(layer, layer)))
            held = (body.scale.at(body.held, micro_batch, run.given) for body in (one, two))
            self._shared[run] = 2 * next(held) - next(held)
        return self._shared[run]

    def layer(self, split: Split, moe: bool, micro_batch: int = 1, recompute: bool = False) -> Saved:
        """Bytes of one layer, including its output, which is the next layer's input."""
        ranks = split.attention()
        if moe and split.etp > 1:
            ranks = replace(ranks, ep=split.ep, etp=split.etp)
        elif moe and split.ep > 1:  # the number of ranks changes only the length of lists of counts
            ranks = replace(ranks, ep=_smallest_factor(self.model.num_experts))
        run = self._run(ranks, self._middle[moe], micro_batch=micro_batch)
        run = replace(run, given=self._given(split), middle=True, recompute=recompute, forward_only=recompute)
        found = self._layer(run)
        return replace(found, held=found.held - self.shared(split, micro_batch))

    def first(self, split: Split, micro_batch: int = 1) -> float:
        """Bytes that the embedding adds."""
        return self._end(split, 0, micro_batch).held if self.model.num_hidden_layers > 1 else 0.0

    def last(self, split: Split, micro_batch: int = 1) -> Saved:
        """Bytes that the final norm, the head and the loss add; in a model of one layer, the embedding's too."""
        return self._end(split, self.model.num_hidden_layers - 1, micro_batch)

    # How it is found

    def _end(self, split: Split, layer: int, micro_batch: int) -> Saved:
        run = self._run(Split(tp=split.tp), layer)
        run = replace(run, without_layers=True, precision=self._plain)
        tokens, unit = self._given(split) * micro_batch, _CHUNKS * self.config.training.loss_chunk_tokens * split.tp
        if tokens <= 2 * unit:
            return self._count(replace(run, given=self._given(split), micro_batch=micro_batch))
        one, two = (self._count(replace(run, given=given)) for given in (unit, 2 * unit))
        steps = tokens / unit - 1
        of_both = ((getattr(one, name), getattr(two, name)) for name in ("held", "working", "between"))
        return Saved(
            **dict(zip(("held", "working", "between"), (a + steps * (b - a) for a, b in of_both), strict=True))
        )

    def _count(self, run: Run) -> Saved:
        if ("end", run) not in self._known:
            self._known["end", run] = count(self.config, run)
        return self._known["end", run]

    def _layer(self, run: Run) -> Saved:
        """One layer with its core."""
        if run not in self._found:
            body, batch, given = self._body(run), run.micro_batch, run.given
            held = body.scale.at(body.held, batch, given)
            if run.forward_only:  # which keeps nothing of the core
                return Saved(held=held, working=0)
            core = self._core(run)
            own = core.scale.at(core.held, batch, given)
            held += own + body.scale.at(_kept(body, core, body.dead), batch, given)
            working, between = max(0, max(_moments(body, core, run)) - held), body.scale.at(body.between, batch, given)
            self._found[run] = Saved(held=held, working=working, between=between)
        return self._found[run]

    def _body(self, run: Run) -> Body:
        split = replace(run.split, cp=1, context=Split().context)
        run = replace(run, split=split)
        return self._recorded("body", run, lambda one, scale: record_body(self.config, one, scale))

    def _core(self, run: Run) -> Core:
        split = Split(tp=run.split.tp, cp=run.split.cp, context=run.split.context)
        run = Run(split=split, given=run.given, layers=(), micro_batch=run.micro_batch, precision=self._plain)
        return self._recorded("core", run, lambda one, scale: record_core(self.model, one, scale))

    def _recorded(self, what: str, run: Run, record: Callable[[Run, Scale], Any]) -> Any:
        """What ``record`` finds for the sizes of `_scale`, or for those of ``run`` where bytes are not proportional."""
        alike, exact = replace(run, given=0, micro_batch=0), Scale(run.micro_batch, run.given, exact=True)
        scale = exact if (what, alike, exact) in self._known else self._scale(run)
        if (what, alike, scale) not in self._known:
            try:
                found = record(replace(run, micro_batch=scale.batch, given=scale.tokens), scale)
            except NotProportional:
                scale, found = exact, record(run, exact)
            self._known[what, alike, scale] = found
        return self._known[what, alike, scale]

    def _scale(self, run: Run) -> Scale:
        """Sizes to record, from which those of ``run`` follow. FP8 pads the rows of each expert to whole blocks: if it does
        for ``run``, it has to do so for these."""
        split, model = run.split, self.model
        exact = Scale(run.micro_batch, run.given, exact=True)
        block = self.block if run.precision == "fp8" else 1
        if run.given % block or run.given % 2:
            return exact
        unit, padded = math.lcm(2, block) * split.tp, None
        if block > 1 and run.layers and model.is_moe_layer(run.layers[0]):
            experts, per_token = model.num_experts // split.ep, model.num_experts_per_tok * split.etp
            padded = Padded(per_token / split.tp, experts, block)
            if not padded.needed(run.micro_batch * run.given):
                unit, padded = unit * (experts // math.gcd(experts, per_token)), None
        batch = prime_without(self._sizes, _BATCH)
        # So many tokens that a tensor that grows with them is larger than all that do not.
        prime = prime_without((*self._sizes, batch), max(_BATCH, FINEST * self._largest // (batch * unit)))
        tokens = prime * unit
        if padded is not None and not padded.needed(batch * tokens):
            return exact
        return Scale(batch, tokens, (batch, prime), padded)

    @property
    def _largest(self) -> int:
        """Bytes of the largest weight in float32."""
        m = self.model
        rows = (
            2 * m.num_experts * m.moe_intermediate_size,
            2 * m.intermediate_size,
            m.num_attention_heads * m.head_dim,
        )
        return 4 * m.hidden_size * max(rows)


def _kept(body: Body, core: Core, dead: tuple[bool, ...]) -> Bytes:
    """What of q, k, v and the output only the core keeps alive."""
    found = NOTHING
    for size, kept, gone in zip(body.qkvy, core.kept, dead, strict=True):
        found = plus(found, size) if kept and gone else found
    return found


def _joined_gradients(body: Body, core: Core, dead: tuple[bool, ...]) -> Bytes:
    """What of the gradients of q, k and v is alive only because another one, in the same storage, is."""
    needed = {group for group, gone in zip(core.joined, dead, strict=True) if not gone}
    found = NOTHING
    for size, group, gone in zip(body.qkvy[:3], core.joined, dead, strict=True):
        found = plus(found, size) if gone and group in needed else found
    return found


def _moments(body: Body, core: Core, run: Run) -> Iterator[int]:
    """Bytes alive at all moments of forward and backward that may be the peak."""

    def outside(found: Bytes) -> int:
        return body.scale.at(found, run.micro_batch, run.given)

    def inside(found: Bytes) -> int:
        return core.scale.at(found, run.micro_batch, run.given)

    before, between, after = body.fronts
    held = inside(core.held)
    yield from (outside(one) for front in before.values() for one in front.all)
    yield from (
        outside(plus(one, _joined_gradients(body, core, dead))) for dead, front in after.items() for one in front.all
    )
    yield from (
        outside(plus(one, _kept(body, core, dead))) + held for dead, front in between.items() for one in front.all
    )
    at_forward = outside(body.forward) - inside(core.forward_begin)
    yield from (at_forward + inside(one) for one in core.forward.all)
    at_backward = outside(plus(body.backward, _kept(body, core, body.dead_in_backward)))
    at_backward += held - inside(core.backward_begin)
    yield from (at_backward + inside(one) for one in core.backward.all)

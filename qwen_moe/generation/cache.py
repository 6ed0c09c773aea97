"""The keys and values of sequences that are read and continued together, without padding.

All prompts of a batch end at the same place in their stores, whatever their lengths, so that each new token of all
sequences is written with one copy. Shapes: P prompts, N new tokens of any of them, H query heads, G key/value heads,
T tokens, C head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
import torch.nn.functional as F

from parallel.gemm import widens
from qwen_moe.generation.whole import attend_whole
from qwen_moe.models.attention.reader import Reader
from qwen_moe.models.ops.decode_attention import decode_attention, merge
from qwen_moe.models.rope import Rope, RotaryTables, apply_rope


@dataclass(frozen=True)
class Chunk:
    """Tokens ``begin`` to ``end`` of a prompt, which are read in one forward pass. ``last``: the prompt ends with them."""

    prompt: int
    begin: int
    end: int
    last: bool

    def __len__(self) -> int:
        return self.end - self.begin


def passes(lengths: Sequence[int], limit: int) -> Iterator[list[Chunk]]:
    """Chunks of prompts of ``lengths`` to read in each forward pass, at most ``limit`` tokens together."""
    chunks: list[Chunk] = []
    room = limit
    for prompt, length in enumerate(lengths):
        begin = 0
        while begin < length:
            if room == 0 or (begin == 0 and chunks and length > room):
                yield chunks  # a prompt that would fit whole into the next pass is not cut
                chunks, room = [], limit
            end = min(length, begin + room)
            chunks.append(Chunk(prompt, begin, end, end == length))
            room -= end - begin
            begin = end
    if chunks:
        yield chunks


class _Store:
    """Keys and values of every layer, ``[P, G, T, C]`` each, made when a layer first writes."""

    def __init__(self, prompts: int, room: int) -> None:
        self.prompts, self.room = prompts, room
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, layer: int, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``k [..., G, C]``: for sizes and device. Where the CPU lacks instructions for k's dtype, the store is in float32:
        attention would widen all of it for every token."""
        if layer not in self.layers:
            dtype = torch.float32 if widens(k) else k.dtype
            shape = (self.prompts, k.shape[-2], self.room, k.shape[-1])
            # Zeros, because what a bias hides must not be NaN.
            keys, values = (torch.zeros(shape, dtype=dtype, device=k.device) for _ in range(2))
            self.layers[layer] = keys, values
        return self.layers[layer]

    def select(self, prompts: torch.Tensor, begin: int) -> None:
        """Keep these ``prompts``, and their tokens from ``begin`` on."""
        self.prompts, self.room = len(prompts), self.room - begin
        for layer, pair in self.layers.items():
            self.layers[layer] = tuple(x[:, :, begin:].index_select(0, prompts.to(x.device)) for x in pair)  # type: ignore[assignment]


class SequenceCache:
    """The cache of a batch of prompts and of ``samples`` answers to each, of up to ``new_tokens`` tokens.

    Before each forward pass `begin_prompts` or `begin_step` says what its tokens are. Answers to one prompt share its keys.
    ``reader`` reads prompts. If it is ``alone``, it also reads new tokens, one sequence after another, and each answer has a
    copy of its prompt; otherwise new tokens of all sequences attend together, as in training. In ``last_layer``, the last
    one of the model, nothing depends on the tokens of a prompt before its last one, so their attention is left out (0).
    """

    def __init__(
        self,
        rope: Rope,
        lengths: Sequence[int],
        *,
        samples: int = 1,
        new_tokens: int,
        reader: Reader,
        alone: bool,
        last_layer: int,
    ) -> None:
        self._rope, self._reader, self._alone, self._samples = rope, reader, alone, samples
        self._last_layer = last_layer
        self._lengths = list(lengths)  # of the prompts that are still here
        self._prompt_room = max(lengths)
        apart = samples > 1 and not alone
        self._prompts = _Store(len(lengths), self._prompt_room + (0 if apart else new_tokens))
        self._answers = _Store(len(lengths) * samples, new_tokens) if apart else None
        self._steps = 0  # new tokens of every sequence so far
        self._chunks: tuple[Chunk, ...] = ()
        self._tables: RotaryTables | None = None
        self._bias: torch.Tensor | None = None

    @property
    def sequences(self) -> int:
        return len(self._lengths) * self._samples

    def begin_prompts(self, chunks: Sequence[Chunk]) -> None:
        """The next pass reads these ``chunks`` of prompts, one after another. Further tokens of it are padding."""
        self._chunks = tuple(chunks)

    def begin_step(self, device: torch.device) -> None:
        """The next pass reads one token of every sequence. Further tokens of it are padding."""
        if not self._steps:
            self._begin_answers(device)
        self._chunks, self._tables = (), None
        self._steps += 1

    def keep(self, prompts: Sequence[int], device: torch.device) -> None:
        """Go on with these ``prompts`` of those that are here, and forget the others."""
        index = torch.tensor(prompts, device=device)
        self._lengths = [self._lengths[prompt] for prompt in prompts]
        begin = self._prompt_room - max(self._lengths)
        self._prompt_room -= begin
        if self._answers is not None:
            rows = index.unsqueeze(1) * self._samples + torch.arange(self._samples, device=device)
            self._answers.select(rows.flatten(), 0)
            self._prompts.select(index, begin)
        else:
            self._prompts.select(self._rows_of(index), begin)
        self._make_bias(device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted_only: bool) -> torch.Tensor:
        """See `qwen_moe.models.attention.cache.Cache`."""
        if self._chunks:
            return self._attend_prompts(layer, q, k, v, wanted_only)
        if self._alone:
            return self._attend_one_by_one(layer, q, k, v)
        return self._attend_together(layer, q, k, v)

    @property
    def steps_together(self) -> bool:
        """Whether the next pass reads one token of every sequence, which attend together."""
        return not self._chunks and not self._alone

    def rotary(self, like: torch.Tensor, tokens: int | None = None) -> RotaryTables:
        """Of the ``tokens`` ``[1, N]`` of this step (by default one of every sequence), shared by all layers; with the dtype
        and device of ``like``."""
        if self._tables is None:
            positions = torch.tensor(self._lengths).repeat_interleave(self._samples) + self._steps - 1
            positions = F.pad(positions, (0, (tokens or len(positions)) - len(positions))).unsqueeze(0)
            self._tables = self._rope.tables(positions.to(like.device), like.dtype)
        return self._tables

    def _rows_of(self, prompts: torch.Tensor) -> torch.Tensor:
        """Rows of the store of prompts: with a reader there is one for each answer, once answers have begun."""
        if self._answers is not None or not self._steps:
            return prompts
        return (prompts.unsqueeze(1) * self._samples + torch.arange(self._samples, device=prompts.device)).flatten()

    def _begin_answers(self, device: torch.device) -> None:
        if self._samples > 1 and self._answers is None:
            copies = torch.arange(len(self._lengths), device=device).repeat_interleave(self._samples)
            self._prompts.select(copies, 0)
        self._make_bias(device)

    def _make_bias(self, device: torch.device) -> None:
        """Hides what lies before the shorter prompts."""
        starts = self._prompt_room - torch.tensor(self._lengths)
        self._bias = None
        if not self._alone and int(starts.max()) > 0:
            hidden = torch.arange(self._prompts.room) < starts.unsqueeze(1)
            dtype = next(iter(self._prompts.layers.values()))[0].dtype
            self._bias = (
                torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))[:, None, None].to(device)
            )

    def _attend_prompts(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted_only: bool
    ) -> torch.Tensor:
        keys, values = self._prompts.of(layer, k)
        asked, (q, k, v) = q.dtype, (x.to(keys.dtype) for x in (q, k, v))
        y = torch.zeros_like(q)
        only_last = wanted_only or layer == self._last_layer
        whole = 0 if only_last else self._attend_whole(layer, q, k, v, y)
        read, answered = sum(map(len, self._chunks[:whole])), 0
        for chunk in self._chunks[whole:]:
            size = len(chunk)
            own = slice(read, read + size)
            read += size
            self._write(layer, chunk, self._reader.keys(k[:, own], chunk.begin)[0], v[0, own])
            first = chunk.begin
            if only_last:
                if not chunk.last:
                    continue
                place = answered if wanted_only else read - 1
                own, first = slice(place, place + 1), chunk.end - 1
                answered += 1
            y[:, own] = self._reader.attend(layer, q[:, own], *self._seen(keys, values, chunk.prompt, chunk.end), first)
        return y.to(asked)

    def _attend_whole(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor) -> int:
        """The attention of the first chunks of this pass that are whole prompts, into ``y``. Returns how many they are."""
        chunks = list(takewhile(lambda chunk: chunk.begin == 0 and chunk.last, self._chunks))
        if not chunks:
            return 0
        lengths = [len(chunk) for chunk in chunks]
        end = sum(lengths)
        y[0, :end], rotated = attend_whole(self._reader, layer, q[0, :end], k[0, :end], v[0, :end], lengths)
        for chunk, keys, values in zip(chunks, rotated.split(lengths), v[0, :end].split(lengths), strict=True):
            self._write(layer, chunk, keys, values)
        return len(chunks)

    def _write(self, layer: int, chunk: Chunk, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store a chunk's keys, as they are cached, and values: ``[S, G, C]`` each."""
        keys, values = self._prompts.of(layer, k)
        start = self._prompt_room - self._lengths[chunk.prompt]
        written = slice(start + chunk.begin, start + chunk.end)
        keys[chunk.prompt, :, written], values[chunk.prompt, :, written] = k.transpose(0, 1), v.transpose(0, 1)

    def _seen(
        self, keys: torch.Tensor, values: torch.Tensor, row: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``length`` tokens of a row, ``[1, T, G, C]``."""
        prompt = row if self._steps == 0 else row // self._samples
        start = self._prompt_room - self._lengths[prompt]
        return tuple(x[row : row + 1, :, start : start + length].transpose(1, 2) for x in (keys, values))  # type: ignore[return-value]

    def _attend_one_by_one(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self._prompts.of(layer, k)
        asked, (q, k, v) = q.dtype, (x.to(keys.dtype) for x in (q, k, v))
        y = torch.zeros_like(q)
        at = self._prompt_room + self._steps - 1
        for row in range(self.sequences):
            begin = self._lengths[row // self._samples] + self._steps - 1
            own = slice(row, row + 1)
            keys[row, :, at] = self._reader.keys(k[:, own], begin)[0, 0]
            values[row, :, at] = v[0, row]
            y[:, own] = self._reader.attend(layer, q[:, own], *self._seen(keys, values, row, begin + 1), begin)
        return y.to(asked)

    def _attend_together(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rotary = self.rotary(q, q.shape[1])
        rows = slice(self.sequences)
        q, k = apply_rope(q, rotary), apply_rope(k, rotary)
        y = self.attend_rotated(layer, q[0, rows], k[0, rows], v[0, rows])
        return F.pad(y, (0, 0, 0, 0, 0, q.shape[1] - len(y))).unsqueeze(0)

    def attend_rotated(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`attend` of one new token of every sequence, in a pass of `steps_together`, after RoPE: ``q [N, H, C]`` and
        ``k, v [N, G, C]`` -> ``[N, H, C]``."""
        assert self._tables is not None
        scale, last, bias = self._tables.softmax_scale, self._steps - 1, self._bias
        keys, values = self._prompts.of(layer, k)
        if self._answers is None:
            end = self._prompt_room + self._steps
            keys[:, :, end - 1], values[:, :, end - 1] = k, v
            bias = None if bias is None else bias[..., :end]
            y, _ = decode_attention(q[:, None], keys[:, :, :end], values[:, :, :end], bias, scale)
            return y[:, 0]
        asked = q.unflatten(0, (len(self._lengths), self._samples))
        of_prompt = decode_attention(asked, keys, values, bias, scale)
        keys, values = self._answers.of(layer, k)
        keys[:, :, last], values[:, :, last] = k, v
        own = decode_attention(q[:, None], keys[:, :, : self._steps], values[:, :, : self._steps], None, scale)
        return merge(tuple(x.flatten(0, 1) for x in of_prompt), tuple(x[:, 0] for x in own))  # type: ignore[arg-type]


def read_prompts(
    prompts: Sequence[Sequence[int]],
    cache: SequenceCache,
    limit: int,
    device: torch.device,
    read: Callable[[torch.Tensor, torch.Tensor, list[Chunk]], torch.Tensor],
) -> torch.Tensor:
    """Logits after each of ``prompts``, ``[P, V]``, which are read into ``cache`` in passes of at most ``limit`` tokens.
    ``read(ids [N], wanted, chunks)`` makes a pass and returns the logits of the tokens with the indices ``wanted``."""
    logits: dict[int, torch.Tensor] = {}
    for chunks in passes([len(prompt) for prompt in prompts], limit):
        ids = [token for chunk in chunks for token in prompts[chunk.prompt][chunk.begin : chunk.end]]
        ends = [end - 1 for chunk, end in zip(chunks, accumulate(map(len, chunks)), strict=True) if chunk.last]
        cache.begin_prompts(chunks)
        wanted = torch.tensor(ends, dtype=torch.int64, device=device)
        found = read(torch.tensor(ids, device=device), wanted, chunks)
        logits |= dict(zip([chunk.prompt for chunk in chunks if chunk.last], found, strict=True))
    return torch.stack([logits[prompt] for prompt in range(len(prompts))])

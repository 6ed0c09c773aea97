"""Records the memory of code that runs on fake tensors, so that it is known for any micro-batch and length from one run.

The recorded run has numbers of sequences and of tokens that share no factor with any other size of the model (`Scale`). So
the size of a tensor tells whether it grows with the sequences, the tokens or both. The bytes at a moment are a sum of such
parts (`Bytes`). Moments at which memory may be largest are kept; which of them is the peak depends on the sizes asked for.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_moe.planning.live_bytes import ASKED, storages

FINEST = 32  # tokens for each byte of the smallest tensor that grows with them: a factor of 4 bytes for 128 tokens


class NotProportional(Exception):
    """A tensor grows with the length, but not in proportion to it."""


@cache
def prime_without(sizes: tuple[int, ...], least: int) -> int:
    """The smallest prime from ``least`` on that divides none of ``sizes``, of which those that are 0 do not matter."""
    number = max(2, least)
    while not all(number % d for d in range(2, math.isqrt(number) + 1)) or any(
        size % number == 0 for size in sizes if size
    ):
        number += 1
    return number


@dataclass(frozen=True)
class Padded:
    """Rows of ``experts`` experts, each padded to a multiple: ``per_token`` rows for each token."""

    per_token: float
    experts: int
    multiple: int

    def rows(self, tokens: int) -> int:
        """The padded rows of ``tokens`` tokens, routed evenly."""
        each, more = divmod(round(self.per_token * tokens), self.experts)
        small, large = (-(-size // self.multiple) * self.multiple for size in (each, each + 1))
        return small * (self.experts - more) + large * more

    def needed(self, tokens: int) -> bool:
        """Whether rows are added at all."""
        return round(self.per_token * tokens) % (self.experts * self.multiple) != 0


# Bytes that are constant, grow with the tokens of a sequence, with the sequences, with both, and with padded rows.
Bytes = tuple[int, int, int, int, int]
NOTHING: Bytes = (0, 0, 0, 0, 0)


def plus(one: Bytes, other: Bytes, sign: int = 1) -> Bytes:
    return tuple(a + sign * b for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Scale:
    """The sizes of a recorded run: ``batch`` sequences of ``tokens`` tokens. If ``exact``, they are those that are asked
    for, and all bytes count as constant. Otherwise ``primes`` divide the one and the other and nothing else."""

    batch: int
    tokens: int
    primes: tuple[int, int] = (1, 1)
    padded: Padded | None = None
    exact: bool = False

    def split(self, size: int) -> Bytes:
        """What a tensor of ``size`` bytes grows with. Raises NotProportional if this cannot be told."""
        if self.exact:
            return size, 0, 0, 0, 0
        of_batch, of_tokens = (size % prime == 0 for prime in self.primes)
        if of_batch and of_tokens:
            return 0, 0, 0, size, 0
        if of_tokens:
            return 0, size, 0, 0, 0
        if self.padded is not None and size % (self.padded.rows(self.batch * self.tokens) // self.padded.multiple) == 0:
            return 0, 0, 0, 0, size
        if of_batch:
            return 0, 0, size, 0, 0
        if size * FINEST >= self.batch * self.tokens:
            raise NotProportional(size)
        return size, 0, 0, 0, 0

    def at(self, found: Bytes, batch: int, tokens: int) -> int:
        """``found`` for ``batch`` sequences of ``tokens`` tokens."""
        constant, of_tokens, of_batch, of_both, of_padded = found
        total = constant + of_tokens * tokens // self.tokens + of_batch * batch // self.batch
        total += of_both * (batch * tokens) // (self.batch * self.tokens)
        if of_padded and self.padded is not None:
            total += of_padded * self.padded.rows(batch * tokens) // self.padded.rows(self.batch * self.tokens)
        return total


class Front:
    """Sums of bytes of which any may be the largest: those that another one exceeds in every part are dropped."""

    def __init__(self) -> None:
        self.all: list[Bytes] = []

    def add(self, found: Bytes) -> None:
        if any(all(a <= b for a, b in zip(found, one, strict=True)) for one in self.all):
            return
        self.all = [one for one in self.all if not all(a <= b for a, b in zip(one, found, strict=True))]
        self.all.append(found)


class Tape(TorchDispatchMode):
    """A context that sums up the bytes of all storages that operations allocate until they are freed.

    ``now`` is what is alive. `mark` begins a new stretch, ``stretches`` has the front of each. ``watched`` are storages
    whose bytes a caller may want to add where they are dead: fronts are kept by which of them are.
    """

    def __init__(self, scale: Scale, peaks: bool = True) -> None:
        super().__init__()
        self.scale, self._peaks = scale, peaks
        self._made: dict[int, tuple[StorageWeakRef, Bytes]] = {}
        self._now = NOTHING
        self.watched: list[tuple[StorageWeakRef, Bytes]] = []
        self.marks: list[tuple[str, Bytes, tuple[bool, ...]]] = []
        self.stretches: dict[str, dict[tuple[bool, ...], Front]] = {}
        self.mark("begin")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED:
            return args[0].fake_device
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        made = [storage for storage in storages(out) if storage._cdata not in given]
        for storage in made:
            if storage._cdata in self._made:  # the address of one that was freed
                self._now = plus(self._now, self._made.pop(storage._cdata)[1], -1)
            found = self.scale.split(storage.nbytes())
            self._made[storage._cdata] = StorageWeakRef(storage), found
            self._now = plus(self._now, found)
        if made and self._peaks:
            self._front().add(self.now)
        return out

    @property
    def now(self) -> Bytes:
        for address in [address for address, (reference, _) in self._made.items() if reference.expired()]:
            self._now = plus(self._now, self._made.pop(address)[1], -1)
        return self._now

    def dead(self) -> tuple[bool, ...]:
        """Which of ``watched`` are freed."""
        return tuple(reference.expired() for reference, _ in self.watched)

    def watch(self, *tensors: torch.Tensor) -> None:
        """Watch the storages of ``tensors`` in place of all others."""
        refs = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
        self.watched = [(ref, self.scale.split(size)) for ref, size in zip(refs, sizes, strict=True)]

    def mark(self, name: str) -> None:
        """Begin the stretch ``name``."""
        self.marks.append((name, self.now, self.dead()))

    def _front(self) -> Front:
        return self.stretches.setdefault(self.marks[-1][0], {}).setdefault(self.dead(), Front())

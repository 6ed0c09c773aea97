"""Rows of experts padded to a multiple, for kernels and scaling blocks that no two experts may share."""

from collections.abc import Sequence

import torch


class Padding:
    """Of rows sorted by expert, ``sizes`` each: where they lie when each expert's are padded to a multiple."""

    def __init__(self, sizes: Sequence[int], multiple: int, device: torch.device) -> None:
        self.sizes = list(sizes)
        self.padded = [-(-size // multiple) * multiple for size in sizes]
        self.needed = self.padded != self.sizes
        if self.needed:
            shift, place = [], 0
            for size, padded in zip(self.sizes, self.padded, strict=True):
                shift.append(place)
                place += padded - size
            real = torch.arange(sum(self.sizes), device=device)
            of_row = torch.repeat_interleave(
                torch.tensor(shift, device=device), torch.tensor(self.sizes, device=device), output_size=real.numel()
            )
            self.index = real + of_row

    def add(self, rows: torch.Tensor) -> torch.Tensor:
        """``[N, D]`` with rows of zeros put in: they change no largest value, and no product."""
        if not self.needed:
            return rows
        out = rows.new_zeros(sum(self.padded), *rows.shape[1:])
        return out.index_copy_(0, self.index, rows)

    def remove(self, rows: torch.Tensor) -> torch.Tensor:
        """The real rows ``[N, D]`` again."""
        return rows.index_select(0, self.index) if self.needed else rows

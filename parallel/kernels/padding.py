"""Pads each expert's rows to a multiple, for kernels that need one and for scaling blocks that must not span two experts."""

from collections.abc import Sequence

import torch


class Padding:
    """Positions of rows sorted by expert (``sizes`` rows each) after each expert's rows are padded to ``multiple``."""

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
        """Insert rows of zeros into ``[N, D]``. They change no amax and no matmul result."""
        if not self.needed:
            return rows
        out = rows.new_zeros(sum(self.padded), *rows.shape[1:])
        return out.index_copy_(0, self.index, rows)

    def remove(self, rows: torch.Tensor) -> torch.Tensor:
        """Drop the padding: the original rows ``[N, D]``."""
        return rows.index_select(0, self.index) if self.needed else rows

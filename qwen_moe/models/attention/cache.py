"""The key/value cache of incremental decoding.

Shapes: B batch, G key/value heads, S sequence, C head dim.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class KeyValueCache:
    """Keys and values of the tokens so far, per layer, each stored as ``[B, G, S, C]`` with room that grows by doubling."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``k, v [B, S_new, G, C]`` and return all keys and values, ``[B, S, G, C]`` each. The caller advances
        ``length`` after all layers."""
        end = self.length + k.shape[1]
        for store, new in ((self.keys, k.transpose(1, 2)), (self.values, v.transpose(1, 2))):
            held = store.get(layer)
            if held is None or held.shape[2] < end:
                grown = new.new_empty(*new.shape[:2], max(2 * end, 64), new.shape[3])
                if held is not None:
                    grown[:, :, : self.length] = held[:, :, : self.length]
                store[layer] = grown
            store[layer][:, :, self.length : end] = new
        return self.keys[layer][:, :, :end].transpose(1, 2), self.values[layer][:, :, :end].transpose(1, 2)

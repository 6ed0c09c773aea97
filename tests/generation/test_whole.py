"""Whole sequences of one pass attend in groups of similar length, as each does alone."""

import pytest
import torch

from qwen_moe.generation.whole import attend_whole, similar
from qwen_moe.models.attention.reader import PlainReader
from qwen_moe.models.rope import make_rope
from tests.small import small_model


def test_neighbors_of_similar_length_are_grouped_and_padding_stays_small() -> None:
    assert similar([5, 5, 5]) == [[5, 5, 5]]
    assert similar([100, 90, 80, 10, 9, 100]) == [[100, 90, 80], [10, 9], [100]]
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0)).sort().values.tolist()
    runs = similar(lengths)
    assert [length for run in runs for length in run] == lengths and len(runs) < 40
    assert sum(max(run) ** 2 * len(run) for run in runs) <= 1.5 * sum(length**2 for length in lengths)


class Calls(PlainReader):
    """Counts the calls of `attend` and the sequences of each."""

    def attend(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int) -> torch.Tensor:
        self.sizes = [*getattr(self, "sizes", []), len(q)]
        return super().attend(layer, q, keys, values, begin)


@pytest.mark.parametrize("lengths", [[7, 7, 7], [9, 8, 8, 2], [1, 1, 12], [5]])
def test_a_group_attends_as_each_sequence_alone(lengths: list[int]) -> None:
    config = small_model()
    reader = Calls(make_rope(config))
    generator = torch.Generator().manual_seed(1)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q, k, v = (
        torch.randn(sum(lengths), count, config.head_dim, generator=generator, dtype=torch.float64)
        for count in (heads, groups, groups)
    )
    y, keys = attend_whole(reader, 0, q, k, v, lengths)
    assert reader.sizes == [len(run) for run in similar(lengths)]
    end = 0
    for length in lengths:
        begin, end = end, end + length
        own = slice(begin, end)
        turned = reader.keys(k[None, own], 0)
        alone = reader.attend(0, q[None, own], turned, v[None, own], 0)
        torch.testing.assert_close(keys[own], turned[0], rtol=0, atol=0)
        torch.testing.assert_close(y[own], alone[0], rtol=1e-12, atol=1e-12)

"""Seconds of single operations on a cluster: GEMMs, memory traffic, rings and messages."""

import math
from collections import Counter
from functools import lru_cache

from qwen_moe.planning.hardware import Cluster
from qwen_moe.planning.software import Software

BF16 = 2  # bytes


class Rates:
    """What a GPU of ``cluster`` and its links do in a second, as ``software`` uses them."""

    def __init__(self, cluster: Cluster, software: Software) -> None:
        self.gpu, self.network, self.gpus_per_node = cluster.gpu, cluster.network, cluster.gpus_per_node
        self.software = software
        self.memory = self.gpu.memory_gb_per_second * 1e9 * self.gpu.efficiency.memory

    def gemm(self, m: float, n: float, k: float, precision: str, count: float = 1, grouped: bool = False) -> float:
        """``count`` GEMMs ``[m, k] x [k, n]``, with those of backward for the gradients of input and weight."""
        e = self.gpu.efficiency
        share = e.grouped_gemm if grouped else e.gemm
        half = e.gemm_half_size
        filled = m / (m + half) * n / (n + half) * k / (k + half)
        peak, quantize = self.gpu.peak_tflops["bf16"] * 1e12 * share, 0.0
        if precision == "fp8":
            peak = self.gpu.peak_tflops["fp8"] * 1e12 * share * e.fp8_gemm / e.gemm
            # Find the largest value, then cast and transpose, for the input and for its gradient: 2 + 2 reads, 1 + 1 writes.
            quantize = 6 * count * m * (k + n) / self.memory
            # Each of the three matrices (input, gradient, weight) has its own kernels for this.
            quantize += 6 * count * self.software.fp8_matrix_us * 1e-6
        time = 2 * m * n * k * count / (peak * filled)
        bytes_ = count * (m * k + k * n + m * n) * BF16
        return 3 * max(time, bytes_ / self.memory) + quantize

    def moved(self, elements: float, times: float, bytes_per_element: float = BF16) -> float:
        """Time of elementwise operations that read or write ``elements`` ``times`` times in forward and backward."""
        return elements * times * bytes_per_element * self.software.elementwise / self.memory

    def group_rate(self, ranks: int, stride: int) -> float:
        """Bytes per second of a ring over ``ranks`` that are ``stride`` apart. Ranks on one node share their adapters, and
        the node with the fewest ranks of a group is the narrowest."""
        e = self.gpu.efficiency
        nvlink = self.gpu.nvlink_gb_per_second * 1e9 * e.nvlink
        here = self.fewest(ranks, stride)
        return nvlink if ranks <= here else min(nvlink, self.network.gb_per_second * 1e9 * e.network * here)

    def latency(self, ranks: int, stride: int) -> float:
        across = self.fewest(ranks, stride) < ranks
        return (self.network.latency_us if across else self.gpu.nvlink_latency_us) * 1e-6

    def message(self, bytes_: float, ranks: int, stride: int) -> float:
        """Every rank of a group sends to the next one, as slow as the slowest of them: each uses its own adapter alone."""
        rate = self.gpu.nvlink_gb_per_second * self.gpu.efficiency.nvlink
        if self.fewest(ranks, stride) < ranks:
            rate = min(rate, self.network.gb_per_second * self.gpu.efficiency.network)
        return bytes_ / (rate * 1e9) + self.latency(ranks, stride)

    def fewest(self, ranks: int, stride: int) -> int:
        """See `fewest_on_a_node`."""
        return fewest_on_a_node(ranks, stride, self.gpus_per_node)

    def ring(self, bytes_: float, ranks: int, stride: int) -> float:
        """An all-gather or reduce-scatter of a tensor that is ``bytes_`` large when whole."""
        return bytes_ * (ranks - 1) / ranks / self.group_rate(ranks, stride) if ranks > 1 else 0.0


@lru_cache(maxsize=4096)
def fewest_on_a_node(ranks: int, stride: int, gpus_per_node: int) -> int:
    """Groups of ``ranks`` that are ``stride`` apart follow one another through nodes of ``gpus_per_node``. The fewest ranks
    that a group has on a node where it has any: all of them only if every group lies within a node. Three ranks side by side
    fit into a node of 8, but the third group has two on the first node and one on the second."""
    if stride >= gpus_per_node:
        return 1
    if gpus_per_node % stride == 0:
        return math.gcd(ranks, gpus_per_node // stride)
    size, found = ranks * stride, ranks
    for first in range(0, math.lcm(size, gpus_per_node), size):
        for offset in range(stride):
            nodes = Counter((first + offset + index * stride) // gpus_per_node for index in range(ranks))
            found = min(found, *nodes.values())
    return found

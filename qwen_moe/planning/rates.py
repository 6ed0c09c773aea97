"""Seconds of single operations on a cluster: GEMMs, memory traffic and rings."""

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
        """Bytes per second of a ring over ``ranks`` that are ``stride`` apart. Ranks on one node share their adapters."""
        e = self.gpu.efficiency
        nvlink = self.gpu.nvlink_gb_per_second * 1e9 * e.nvlink
        here = min(ranks, max(1, self.gpus_per_node // stride))
        return nvlink if ranks <= here else min(nvlink, self.network.gb_per_second * 1e9 * e.network * here)

    def latency(self, ranks: int, stride: int) -> float:
        across = ranks * stride > self.gpus_per_node
        return (self.network.latency_us if across else self.gpu.nvlink_latency_us) * 1e-6

    def ring(self, bytes_: float, ranks: int, stride: int) -> float:
        """An all-gather or reduce-scatter of a tensor that is ``bytes_`` large when whole."""
        return bytes_ * (ranks - 1) / ranks / self.group_rate(ranks, stride) if ranks > 1 else 0.0

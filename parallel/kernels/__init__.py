"""Providers of matmul kernels for parallel layers: plain torch, FP8 through torch, and others behind one interface."""

"""Attention: projections, which keys a query may see, and the kernels that compute scores."""

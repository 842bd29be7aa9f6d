"""The operators for CPU tensors: plain loops over rows, compiled by numba on first use and cached on disk."""

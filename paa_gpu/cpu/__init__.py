"""The operators for CPU tensors: plain loops over rows. numba compiles them on first use and caches them on the disk."""

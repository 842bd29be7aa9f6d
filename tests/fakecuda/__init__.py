"""CUDA devices in the memory of the host, for torch as it is. See README.md."""

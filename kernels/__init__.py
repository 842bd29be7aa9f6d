"""Triton kernels of paa_gpu, one module per capability; imported as ``paa_gpu.kernels``, never as ``kernels``."""

# A public package is called `kernels`, and a file loaded under two names would register its operators twice.
if __name__ != "paa_gpu.kernels":
    raise ImportError(f"this package must be imported as `paa_gpu.kernels`, got `{__name__}`")

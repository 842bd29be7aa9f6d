"""Triton kernels of paa_gpu, one module for each capability. Import them as ``paa_gpu.kernels``, never as ``kernels``."""

# A public package is called `kernels`, and a file loaded under two names would register its operators twice.
if __name__ != "paa_gpu.kernels":
    raise ImportError(f"this package must be imported as `paa_gpu.kernels`, got `{__name__}`")

try:
    import triton  # noqa: F401  # macOS has none, Windows one of another name
except ImportError as error:
    raise ImportError(
        "tensors on a CUDA device need Triton: pip install triton (on Windows: triton-windows); tensors on the CPU need none"
    ) from error

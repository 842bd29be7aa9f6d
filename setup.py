"""Metadata, and the one mapping: `kernels/` is installed as `paa_gpu.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="paa-gpu",
    version=re.search(r'__version__ = "(.+)"', (HERE / "paa_gpu/__init__.py").read_text())[1],
    description="Probabilistic anchor assignment (PAA) on the GPU and the CPU: selection, mixture fit, reassignment",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    # The tracked link paa_gpu/kernels makes the mapping true for checkouts, mypy and editors; installs go by the mapping.
    packages=[*find_packages(include=["paa_gpu", "paa_gpu.*"], exclude=["paa_gpu.kernels*"]), "paa_gpu.kernels"],
    package_dir={"paa_gpu.kernels": "kernels"},
    package_data={"paa_gpu": ["py.typed"], "paa_gpu.data": ["*.npz", "*.jpg", "*.md", "LICENSE.*"]},
    python_requires=">=3.10",
    # The lower bounds are those that `make test-oldest` installs; torch and Triton move together.
    install_requires=[
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
        "numpy>=1.26",
        "numba>=0.61",
    ],
    extras_require={
        "demo": ["matplotlib>=3.8", "pillow>=10", "scikit-learn>=1.7"],
        "head": ["torchvision>=0.24"],
        "onnx": ["onnx>=1.19", "onnxscript>=0.6.2"],
        "examples": ["paa-gpu[demo,head]", "pycocotools>=2.0.8", "tqdm>=4.62"],
        "test": [
            *("paa-gpu[examples,onnx]", "build>=1.2.1", "ensemble-boxes>=1.0.9", "hypothesis>=6.100", "onnxruntime>=1.23"),
            *("pytest>=8", "pytest-benchmark>=5", "pytest-cov>=5", "pytest-xdist>=3.5"),
        ],
        "docs": ["furo>=2024.8", "myst-parser>=4", "sphinx>=8.1"],
        "dev": ["paa-gpu[test,docs]", "mypy>=1.13", "pre-commit>=4", "ruff>=0.9", "twine>=6.1"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)

"""Probabilistic anchor assignment (PAA) on the GPU and the CPU."""

__version__ = "0.1.0"

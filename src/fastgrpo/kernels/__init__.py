"""Kernels of our own where chains of PyTorch operators cost more than what they compute."""

"""Measurements: kernels on a GPU, and compiled kernels without one."""

"""Benchmarks: the speed of operations, compiled kernels without a GPU, and parallel solvers."""

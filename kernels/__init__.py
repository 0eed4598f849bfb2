"""Kernels: CUDA C++ that is also the host library."""

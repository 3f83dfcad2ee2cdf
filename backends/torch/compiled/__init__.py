"""Kernels for the processor at hand, compiled by LLVM when a shape is first asked for: algorithm ``compiled``."""

"""Kernels and the operators that stand for them: plain tensors in, plain tensors out."""

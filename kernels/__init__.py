"""Triton kernels, one module per op; each offers `forward` and `backward` with the raw op's arguments."""

"""Kernels and the plain PyTorch that they are judged against: torch and triton only."""

if __name__ != "fastmem.kernels":
    raise ImportError(f"this folder is fastmem.kernels, not {__name__}: import fastmem.kernels")

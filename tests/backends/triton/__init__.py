"""Tests of the Triton kernels: in the interpreter (TRITON_INTERPRET=1), or on a GPU."""

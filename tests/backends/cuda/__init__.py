"""Tests of the CUDA kernels. Without a GPU they run on the CPU, compiled by g++ through the headers in `shim`."""

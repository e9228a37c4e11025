"""Tests of the kernels, backend by backend.

These folders are packages, so that a folder named `triton` never stands in for the module of that name, and so that
each backend may have a test of the same op.
"""

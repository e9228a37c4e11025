"""The Triton kernels, compiled without a GPU; beside the folder `triton`, which a script would take for the module."""

"""The kernels: a package a backend, whose modules mirror the files of the ops."""

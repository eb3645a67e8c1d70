"""Sparse encode and decode kernels for sparse autoencoders."""

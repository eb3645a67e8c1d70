"""Sparse dictionaries of language models."""

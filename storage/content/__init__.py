"""Datasets and base models, named by their digests: shared by all sweeps, fetched once for each node."""

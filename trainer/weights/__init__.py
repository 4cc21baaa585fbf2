"""Arithmetic on finished weights: extract, resize, mix. Plain functions on tensors; no files, no models."""

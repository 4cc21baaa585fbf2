"""Bytes, names, logs: commit, push, prune. Imports neither of the other packages, no torch and no Ray."""

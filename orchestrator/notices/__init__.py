"""Notices: what a node is told of its own end before it comes."""

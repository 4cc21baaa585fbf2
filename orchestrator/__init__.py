"""Decides who trains what, where and when."""

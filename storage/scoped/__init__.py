"""Nodes that hold no credentials: what they may ask the controller for, and who signs and verifies it."""

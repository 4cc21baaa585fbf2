"""Turns a RunSpec into an adapter. Knows neither the orchestrator nor Ray."""

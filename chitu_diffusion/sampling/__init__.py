"""Solvers of the flow, and the noise that they start from."""

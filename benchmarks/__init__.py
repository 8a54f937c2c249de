"""Measurements of speed and fidelity, each one command: `python -m benchmarks.NAME --help` says what it
takes.
"""

"""Layouts of ranks, their process groups and collectives, and attention over a sharded sequence."""

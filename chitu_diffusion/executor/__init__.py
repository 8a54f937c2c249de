"""Rank 0 and its workers: one work unit on one rank, or on all of them at once."""

"""Checkpoint files, read strictly and straight to their device."""

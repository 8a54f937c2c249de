"""Adapters of a network's weights: LoRA and its kin, read, placed and merged."""

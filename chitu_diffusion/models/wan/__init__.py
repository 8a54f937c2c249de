"""The Wan family: its networks and what belongs to each size of them."""

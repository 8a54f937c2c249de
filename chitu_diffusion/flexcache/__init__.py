"""Caches that save a network work, behind one seam (`seam.py`)."""

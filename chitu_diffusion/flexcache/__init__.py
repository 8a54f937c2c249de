"""Caches that save a network work, behind one interface (`interface.py`)."""

"""The command line: one file for each group of commands, put together in `app.py`.

Knows words, terminals and exit codes; what it orders is done by the engine. Nothing here imports
torch at import time, so that `chitu --help` answers at once.
"""

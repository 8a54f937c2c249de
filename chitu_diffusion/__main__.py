"""`python -m chitu_diffusion` and the `chitu` command. Knows only where the command line begins."""

from __future__ import annotations

import sys

from chitu_diffusion.cli.app import run


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run())


if __name__ == "__main__":
    main()

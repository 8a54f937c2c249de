"""`python -m chitu_diffusion` and the `chitu` command. Knows only where the command line begins."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    # closed by the caller (`2>&-`), a stream is None, and what is meant for it would land in the other one
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    # what imports make stays: to look through it again and again for rubbish is a fifth of the start
    gc.set_threshold(100_000, 20, 50)
    try:
        # inside, so that Ctrl+C during the import is as quiet as later
        from chitu_diffusion.cli.streams import exit_code, open_streams

        open_streams()
        from chitu_diffusion.cli.app import run
        from chitu_diffusion.config import set_openmp_defaults, set_torch_cache

        set_openmp_defaults()  # before torch is imported
        set_torch_cache()
        code = exit_code(run())
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()

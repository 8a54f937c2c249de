"""stdout and stderr as streams that may fail without failing a job: what cannot be printed is lost, the video
is not. Knows nothing of what is printed.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO, cast

_MAKERS = {"generate", "batch"}
"""Commands whose videos count, whether or not their names could be printed."""


class Stream(io.TextIOWrapper):
    """Text to a file or terminal. After the first error all goes nowhere.

    Attributes:
        lost: that error; None while all is well. That a reader of stdout went (`| head`) is raised, too.
    """

    lost: OSError | None = None

    def write(self, text: str) -> int:
        """As any stream's, but for errors."""
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As any stream's, but for errors."""
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno == errno.EPIPE and self is sys.stdout:
            raise error


def open_streams() -> None:
    """Put such streams in the place of this process's own."""
    sys.stdout = _over(sys.stdout)
    sys.stderr = _over(sys.stderr)


def _over(stream: TextIO) -> TextIO:
    own = cast(io.TextIOWrapper, stream)
    encoding = own.encoding
    errors = own.errors
    at_once = own.line_buffering
    return Stream(own.detach(), encoding=encoding, errors=errors, line_buffering=at_once)


def exit_code(code: int) -> int:
    """A command's exit code, once all is printed: 1 in place of 0 where its answer was lost."""
    stdout = sys.stdout
    try:
        stdout.flush()
    except BrokenPipeError:
        return code or 1
    if not isinstance(stdout, Stream) or stdout.lost is None:
        return code
    sys.stderr.write(f"stdout cannot be written to: {stdout.lost.strerror}; what was printed there is lost\n")
    return code or int(_MAKERS.isdisjoint(sys.argv[1:]))

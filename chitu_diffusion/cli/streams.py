"""stdout and stderr as streams that may fail without failing a job: what cannot be printed is lost, the video
is not; a character that their encoding lacks is spelt out. Knows nothing of what is printed.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import TextIO, cast

_MAKERS = {"generate", "batch"}
"""Commands whose videos count, whether or not their names could be printed."""


_SPELT = "chitu.spelt"
"""Name of `_spell` among Python's error handlers."""


class Stream(io.TextIOWrapper):
    """Text to a file or terminal. After the first error all goes nowhere.

    Attributes:
        lost: that error; None while all is well.
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


def open_streams() -> None:
    """Put such streams in the place of this process's own."""
    codecs.register_error(_SPELT, _spell)
    sys.stdout = _over(sys.stdout)
    sys.stderr = _over(sys.stderr)


def _over(stream: TextIO) -> TextIO:
    own = cast(io.TextIOWrapper, stream)
    encoding = own.encoding
    at_once = own.line_buffering
    return Stream(own.detach(), encoding=encoding, errors=_SPELT, line_buffering=at_once)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte of a file's name that was no text as it is, a character that the encoding lacks as `\\u732b`."""
    assert isinstance(error, UnicodeEncodeError)
    start = error.start
    is_byte = "\udc80" <= error.object[start] <= "\udcff"
    first = UnicodeEncodeError(error.encoding, error.object, start, start + 1, error.reason)
    return codecs.lookup_error("surrogateescape" if is_byte else "backslashreplace")(first)


def exit_code(code: int) -> int:
    """A command's exit code, once all is printed: 1 in place of 0 where its answer was lost. A reader that
    went (`| head`) has what it wanted.
    """
    stdout = sys.stdout
    stdout.flush()
    if not isinstance(stdout, Stream) or stdout.lost is None or stdout.lost.errno == errno.EPIPE:
        return code
    sys.stderr.write(f"stdout cannot be written to: {stdout.lost.strerror}; what was printed there is lost\n")
    return code or int(_MAKERS.isdisjoint(sys.argv[1:]))

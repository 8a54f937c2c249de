"""A file of rows as people have them: .txt, .jsonl, .csv; of Windows, Excel and pandas too.

Knows encodings, delimiters and how a cell is written. What a row's fields mean is not known here.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from chitu_diffusion.cli import options
from chitu_diffusion.errors import UsageError
from chitu_diffusion.files.reading import cause, parse_json, read_bytes

Rows = Iterator[tuple[int, Any]]
"""Line numbers, from 1, and a row's values by name, or what is wrong with it."""
WHOLE_NUMBERS = ("height", "width", "num_frames", "num_inference_steps", "seed", "priority")
_TOO_MANY = "\n"
"""Where csv puts cells beyond the header's; no header has this name."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS = ",;\t"


def read_values(file: Path, known: Collection[str], note: Callable[[str], None]) -> Rows:
    """The rows of a file.

    Args:
        file: .txt (one prompt a line), .jsonl (one object a line) or .csv (with a header).
        known: names that a header may have; they tell which delimiter it uses.
        note: is told what is left out.

    Raises:
        UsageError: another ending, or a file that cannot be read.
    """
    ending = file.suffix.lower()
    if ending not in (".txt", ".jsonl", ".csv"):
        raise UsageError(f"'{file}': use .txt, .jsonl or .csv", field="file")
    text = _text(file)
    if ending == ".txt":
        return _txt(text, note)
    return _jsonl(text) if ending == ".jsonl" else _csv(text, known, note)


def _text(file: Path) -> str:
    try:
        data = read_bytes(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{file}': {cause(error)}", field="file") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not encoding and b"\0" in data[:2]:
        encoding = "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:
        return data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read '{file}': it is not {error.encoding.upper()} at byte {error.start}; save it as "
            "UTF-8, or 'iconv -f GBK -t UTF-8' (or -f WINDOWS-1252) makes it so",
            field="file",
        ) from error


def _txt(text: str, note: Callable[[str], None]) -> Rows:
    comments = []
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines() would cut at form feeds too
        if content.lstrip().startswith("#"):
            comments.append(line)
        elif content.strip():
            yield line, {"prompt": content.strip()}
    if comments:
        lines = ", ".join(map(str, comments[:10])) + (", ..." if len(comments) > 10 else "")
        note(
            f"{len(comments)} line(s) that begin with '#' are comments and left out (line {lines}); a prompt "
            "may begin so in a .jsonl"
        )


def _jsonl(text: str) -> Rows:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            values = parse_json(content, checks_text=False)
        except ValueError as error:
            yield line, UsageError(f"not JSON: {error}")
            continue
        yield (
            line,
            values if isinstance(values, dict) else UsageError('use an object such as {"prompt": "..."}'),
        )


def _csv(text: str, known: Collection[str], note: Callable[[str], None]) -> Rows:
    first, _, rest = text.partition("\n")
    skipped = 0
    delimiter = max(_DELIMITERS, key=lambda each: len(set(_names(first, each)) & set(known)))
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own first line
        delimiter = first[4]
        text = rest
        skipped = 1
    # strict: a quote that is never closed would take all rows below it into one prompt
    reader = csv.DictReader(
        io.StringIO(text, newline=""), restkey=_TOO_MANY, delimiter=delimiter, strict=True
    )
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if len(set(names)) < len(names):
            yield 1, UsageError("the header has a name twice")
            return
        if "" in names:
            note("a column without a name (pandas' index) is left out")
        for record in reader:
            if any(record.values()):
                yield reader.line_num + skipped, _record(record, delimiter)
    except csv.Error as error:
        yield reader.line_num + skipped, UsageError(f"not CSV: {error}; no row from here on is read")


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _record(record: Mapping[str, str], delimiter: str) -> Any:
    if _TOO_MANY in record:
        return UsageError("more cells than the header has names")
    try:
        return {name: _cell(name, cell, delimiter) for name, cell in record.items() if name and cell}
    except ValueError as error:
        return UsageError(str(error))


def _cell(name: str, text: str, delimiter: str) -> Any:
    if name in WHOLE_NUMBERS:
        whole, _, zeros = text.strip().partition(".")  # pandas writes 3.0 where a column has gaps
        try:
            if zeros.strip("0"):
                raise ValueError
            return int(whole)
        except ValueError:
            raise ValueError(f"{name} = {text!r}: must be a whole number") from None
    if name in ("shift", "strength"):
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name} = {text!r}: must be a number") from None
    if name == "guidance_scale":
        if delimiter == ";" and "," in text:
            raise ValueError(f"{name} = {text!r}: write 2.5 with a point; a pair of two goes into a .jsonl")
        return options.parse_guidance(text)
    if name == "lora" and text.lstrip().startswith("["):
        return parse_json(text)
    return options.parse_cache(text) if name == "flexcache" else text

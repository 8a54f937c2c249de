"""What may go wrong, and what the person at the other end should do about it.

The tree, with the exit code that the command line gives for each:

    ChituError
    ├── UsageError            2    a value that cannot be: names the field, the value, what to use
    ├── WillNotFitError       3    the request needs more memory than there is
    ├── ModelError            4    no usable model
    │   ├── ModelMissingError      nothing of that name on this machine
    │   └── CheckpointError        a file of it is incomplete, misshapen or mislabelled
    ├── CompileError          1    torch cannot compile a part of the network: names it and the switch
    ├── RankLostError         1    a rank of the group died or froze, and with it the group
    └── TaskError             1    one task failed; the engine and every other task go on
        ├── StageError             a stage raised: stage, step and cause are named
        ├── NonFiniteError         a NaN or Inf was found in a tensor (also a ValueError)
        ├── OutputError            the finished video could not be written
        └── CannotResumeError      a saved task is damaged, or was made by something else

Every message says what, where, why, and the next thing to do. This file knows nothing of the
rest of the package, so that anything may import it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from numbers import Integral, Real
from types import FunctionType
from typing import Any, TypeVar

T = TypeVar("T")

_LONGEST_VALUE = 1000


class ChituError(Exception):
    """Base of all errors that the package raises on purpose."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle brings back message and attributes, whatever the arguments of the class are."""
        return _unpickled, (type(self), self.args), vars(self)


def _unpickled(kind: type[ChituError], args: tuple[object, ...]) -> ChituError:
    return kind.__new__(kind, *args)


class UsageError(ChituError, ValueError):
    """A value that cannot be used. Raised before anything is loaded."""

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class WillNotFitError(ChituError):
    """The request needs more memory than this machine has, at every memory level."""

    exit_code = 3


class ModelError(ChituError):
    """There is no usable model."""

    exit_code = 4


class ModelMissingError(ModelError):
    """No model of that name is on this machine; the message tells how to get it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(ModelError):
    """A checkpoint file is missing, truncated, misshapen or mislabelled.

    Args:
        problem: what is wrong, in words.
        file: the file at fault.
        key: the tensor's name in that file, where one is at fault.
        expected, found: what should stand there and what does.
        remedy: the next command; by default how to verify and fetch the model again.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str = (
            "check the folder with 'chitu models verify FOLDER', or fetch it again with 'chitu models pull "
            "NAME'"
        ),
    ) -> None:
        parts = [problem]
        details = {"file": file, "key": key, "expected": expected, "found": found}
        parts += [f"{name}: {_short(value)}" for name, value in details.items() if value is not None]
        parts.append(remedy)
        super().__init__("; ".join(parts))
        self.file = file
        self.key = key
        self.expected = expected
        self.found = found


class CompileError(ChituError):
    """A part of the network cannot be compiled; the message names it, the cause, and how to do without."""


class RankLostError(ChituError):
    """A rank of the group died, froze or left; the group cannot go on. Names its rank, host and place."""


class TaskError(ChituError):
    """One task failed. Other tasks are untouched."""


class StageError(TaskError):
    """A stage of a task raised.

    Args:
        stage: "encoding", "denoising", "decoding" or "saving".
        step: index of the denoising step (from 0), or None outside denoising.
        cause: what was raised.
    """

    def __init__(self, stage: str, step: int | None, cause: BaseException) -> None:
        where = stage if step is None else f"{stage}, step {step}"
        super().__init__(f"failed in {where}: {type(cause).__name__}: {cause}")
        self.stage = stage
        self.step = step
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        """A cause of a class that others made may not come through a pickle; what it says does."""
        kind = type(self.cause)
        plain = isinstance(self.cause, ChituError) or kind.__module__ == "builtins"
        cause = self.cause if plain else RuntimeError(f"{kind.__name__}: {self.cause}")
        return _unpickled, (type(self), self.args), {**vars(self), "cause": cause}


class NonFiniteError(TaskError, ValueError):
    """A tensor holds NaN or Inf."""


class OutputError(TaskError):
    """The video could not be written."""


class CannotResumeError(TaskError):
    """A saved task cannot go on here; the message says why."""


def _short(value: object) -> str:
    """A value of a file that may hold anything, on one line."""
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({len(text)} characters)"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: " Did you mean 'x'?", or the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(known)}."


_NOUNS = (("int", "a whole number"), ("float", "a number"), ("bool", "true or false"), ("string", "text"))
"""How pydantic's name for a mistake begins, and what the value must be."""


def what_to_use(mistake: Mapping[str, Any], limits: Iterable[object]) -> str:
    """What to use in place of a value that pydantic refuses: the choices, or the kind of value and its range.
    What a check of ours says stands as it is.

    Args:
        mistake: one of `ValidationError.errors()`.
        limits: `metadata` of the field.
    """
    kind = mistake["type"]
    if kind == "literal_error":
        return f"use {mistake['ctx']['expected']}"
    said: dict[str, Any] = {}
    for limit in limits:
        said |= asdict(limit) if is_dataclass(limit) and not isinstance(limit, type) else {}
    low = f"more than {said['gt']}" if "gt" in said else f"{said.get('ge', '')}"
    values = f"{low} to {said['le']}" if "le" in said else f"{low} or more" if "ge" in said else low
    if kind.startswith(("greater_than", "less_than")):
        return f"use {values}"
    noun = next((noun for start, noun in _NOUNS if kind.startswith(start)), None)
    if noun is None:
        return str(mistake["msg"]).removeprefix("Value error, ")  # pydantic's, before what ours says
    return f"use {noun}{', ' if values else ''}{values}"


def require_kind(name: str, value: object, kind: type | tuple[type, ...], use: str) -> None:
    """An argument must be of a class.

    Args:
        use: what to use, in words.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name} is a {type(value).__name__}; use {use}", field=name)


def plain_number(value: Any) -> Any:
    """A number of numpy's or another library's as Python's own, each in a tuple or list; anything else as it
    is.
    """
    if isinstance(value, tuple | list):
        return type(value)(map(plain_number, value)) if type(value) in (tuple, list) else value
    if isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def require_callable(name: str, value: object) -> None:
    """A function to call back, or None. Raises UsageError for anything else."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} is a {type(value).__name__}; use a function", field=name)


def names_checked(kind: type[T]) -> type[T]:
    """Has a class's public methods refuse an unknown argument's name with the nearest (UsageError), where
    Python's TypeError names none.
    """
    for name, method in list(vars(kind).items()):
        if isinstance(method, FunctionType) and (name == "__init__" or not name.startswith("_")):
            setattr(kind, name, _with_names_checked(method))
    return kind


def _with_names_checked(method: FunctionType) -> Callable[..., Any]:
    _, *parameters = inspect.signature(method).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return method
    names = {parameter.name for parameter in parameters}

    @functools.wraps(method)
    def checked(*values: Any, **fields: Any) -> Any:
        for name in fields:
            if name not in names:
                said = nearest(name, names) if names else " It takes no arguments by name."
                raise UsageError(f"{method.__qualname__} takes no '{name}'.{said}", field=name)
        return method(*values, **fields)

    return checked


def raise_first(errors: Iterable[Exception | None]) -> None:
    """Raise the first of the errors that there are."""
    for error in errors:
        if error is not None:
            raise error


def without_frames(error: BaseException) -> BaseException:
    """The same error and its causes without their tracebacks, which keep a stage's tensors alive."""
    seen: BaseException | None = error
    known: set[int] = set()
    while seen is not None and id(seen) not in known:
        known.add(id(seen))
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error

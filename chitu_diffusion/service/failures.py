"""Why a job failed, as a code and words that hold no path, no prompt and no library's text. Knows errors; no
jobs' rows.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from chitu_diffusion.errors import NonFiniteError, RankLostError, StageError, UsageError, WillNotFitError

_INPUTS = ("image", "last_image", "video", "lora")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_AWAY = frozenset({errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EROFS})


def failure_of(error: BaseException) -> tuple[dict[str, Any], bool]:
    """The fields of a `JobFailure`, and whether the same job may do better later."""
    chain = list(_causes(error))
    stage = next((each for each in chain if isinstance(each, StageError)), None)
    where = {} if stage is None else {"stage": stage.stage, "step": stage.step}
    said, may_pass = _said(chain, "the job" if stage is None else stage.stage)
    return {**where, "cause": type(chain[-1]).__name__, **said}, may_pass


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it."""
    known: set[int] = set()
    while error is not None and id(error) not in known:
        known.add(id(error))
        yield error
        error = error.cause if isinstance(error, StageError) else error.__cause__ or error.__context__


def _said(chain: list[BaseException], what: str) -> tuple[dict[str, str], bool]:
    numbers = {each.errno for each in chain if isinstance(each, OSError)}
    if numbers & _FULL:
        return {"code": "disk_full", "message": "there is no space left for its files"}, True
    if numbers & _AWAY:
        return {"code": "storage", "message": "its files cannot be read or written now"}, True
    if _any(chain, RankLostError):
        return {"code": "rank_lost", "message": "a rank of its worker died or froze"}, True
    if _any(chain, WillNotFitError):
        said = {"code": "will_not_fit", "message": "it needs more memory than its worker has"}
        return {**said, "next": "use fewer frames or a smaller size"}, False
    if _any(chain, NonFiniteError):
        said = {"code": "non_finite", "message": f"{what}: NaN or infinity appeared"}
        return {**said, "next": "try another seed, or another precision"}, False
    for each in chain:
        if isinstance(each, UsageError):
            lost = f"its {each.field} cannot be used any more; hand it over again"
            return {"code": "bad_value", "message": lost if each.field in _INPUTS else str(each)}, False
    return {"code": "internal", "message": f"{what}: an error that nobody expected; see the log"}, False


def _any(chain: list[BaseException], kind: type[BaseException]) -> bool:
    return any(isinstance(each, kind) for each in chain)

"""What `chitu calibrate` measured on a model, as a file beside its weights, and what is picked from it.

Second moments of full-compute runs, from which a plan for any number of steps follows (`plan_search`);
TeaCache's polynomial and MagCache's ratios; and a table of plans that were really run, with what they kept of
the picture. Plain data: no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import CheckpointError, UsageError
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.files.reading import cause, foreign_data, read_json

if TYPE_CHECKING:
    from chitu_diffusion.flexcache.plan_search import Traces

CALIBRATION_FILE = "flexcache.json"
_FORMAT = 1
_DIGITS = 9
"""Decimals of a moment: divided differences of neighbouring steps are some 1e-4 of the moments themselves."""


@dataclass(frozen=True)
class Verified:
    """A setting that was really run against full compute.

    Attributes:
        flexcache: as a request names it.
        speedup: forwards of full compute over forwards of the setting.
        psnr, ssim: on raw frames, mean over videos with its 95 % interval: (mean, low, high).
        videos: how many, of prompts and seeds that the fits did not see.
    """

    flexcache: Mapping[str, Any]
    speedup: float
    psnr: tuple[float, float, float]
    ssim: tuple[float, float, float]
    videos: int


@dataclass(frozen=True)
class Calibration:
    """See the file's docstring.

    Attributes:
        about: what it was measured on: the fingerprint (weights_sha256, sampler, dtype ...), steps, guidance,
            size, prompts, versions.
        sigmas: noise levels of the runs, [steps + 1].
        moments: rows of the lower triangle of the mean inner products, see `planning.Traces`.
        gain: of an error at each step, [steps].
        measured: "teacache" and "magcache", as `schedule.Measured`.
        table: by rising speed.
        plans: those that were calculated from this, by what they were asked for; kept while the model is.
    """

    about: Mapping[str, Any]
    sigmas: tuple[float, ...]
    moments: tuple[tuple[float, ...], ...]
    gain: tuple[float, ...]
    measured: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    table: tuple[Verified, ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def traces(self) -> Traces:
        """The moments as `plan_search` takes them; weights and guidance are those of the runs' own
        schedule.
        """
        import numpy as np

        from chitu_diffusion.flexcache.plan_search import Traces

        lower = np.zeros((len(self.moments), len(self.moments)))
        for row, values in enumerate(self.moments):
            lower[row, : row + 1] = values
        sigmas = np.array(self.sigmas)
        steps = len(self.sigmas) - 1
        scale = float(self.about["guidance"][0])
        return Traces(
            sigmas=sigmas,
            moments=lower + np.tril(lower, -1).T,
            response=np.diff(sigmas),
            gain=np.array(self.gain),
            guidance=np.full(steps, scale),
        )

    def for_fidelity(self, decibels: float) -> Verified:
        """The fastest setting whose mean PSNR was at least this.

        Raises:
            UsageError: none was.
        """
        good = [row for row in self.table if row.psnr[0] >= decibels]
        if not good:
            best = max((row.psnr[0] for row in self.table), default=math.nan)
            raise UsageError(
                f"--fidelity {decibels:g}dB: the nearest calibrated plan kept {best:.1f} dB; leave the "
                "cache out for exact videos",
                field="fidelity",
            )
        return max(good, key=lambda row: row.speedup)

    def for_speedup(self, speedup: float) -> tuple[dict[str, Any], float | None]:
        """A plan of this speed, and the PSNR to expect: between its neighbours in the table, None beyond
        them.

        Raises:
            UsageError: not above 1.
        """
        if not 1 < speedup < math.inf:
            raise UsageError(f"--speedup {speedup:g}: use a number above 1, such as 2", field="speedup")
        rows = [row for row in self.table if row.flexcache.get("strategy") == "plan"]
        below = [row for row in rows if row.speedup <= speedup + 1e-9]
        above = [row for row in rows if row.speedup >= speedup - 1e-9]
        flexcache = {"strategy": "plan", "speedup": float(speedup)}
        if not below or not above:
            return flexcache, None
        low = max(below, key=lambda row: row.speedup)
        high = min(above, key=lambda row: row.speedup)
        span = high.speedup - low.speedup
        share = (speedup - low.speedup) / span if span else 0.0
        return flexcache, low.psnr[0] + share * (high.psnr[0] - low.psnr[0])


def triangle(moments: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """The lower triangle of a symmetric matrix, rounded as it is stored."""
    return tuple(
        tuple(round(float(value), _DIGITS) for value in row[: index + 1]) for index, row in enumerate(moments)
    )


def write_calibration(calibration: Calibration, folder: str | Path) -> Path:
    """Writes the file into a model's folder, whole or not at all.

    Raises:
        UsageError: the folder cannot be written to.
    """
    path = Path(folder) / CALIBRATION_FILE
    try:
        said = {name: value for name, value in asdict(calibration).items() if name != "plans"}
        write_text(path, json.dumps({"format": _FORMAT, **said}) + "\n")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; copy the model to a folder of your own",
            field="output",
        ) from error
    return path


def read_calibration(folder: str | Path) -> Calibration | None:
    """What was measured on the model in a folder; None where nothing was.

    Raises:
        CheckpointError: the file cannot be used.
    """
    path = Path(folder) / CALIBRATION_FILE
    remedy = "delete the file, or measure again with 'chitu calibrate'"
    try:
        data = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the calibration cannot be read: {cause(error)}", file=path, remedy=remedy
        ) from error
    with foreign_data(
        lambda why: CheckpointError(f"the calibration cannot be used: {why}", file=path, remedy=remedy)
    ):
        if data.pop("format") != _FORMAT:
            raise ValueError("another version of chitu wrote it")
        table = tuple(
            Verified(**{**row, "psnr": tuple(row["psnr"]), "ssim": tuple(row["ssim"])})
            for row in data.pop("table")
        )
        found = Calibration(
            about=data["about"],
            sigmas=tuple(data["sigmas"]),
            moments=tuple(tuple(row) for row in data["moments"]),
            gain=tuple(data["gain"]),
            measured={name: tuple(values) for name, values in data["measured"].items()},
            table=table,
        )
        _check(found)
        return found


def _check(found: Calibration) -> None:
    """Raises ValueError where the parts do not fit together."""
    steps = len(found.sigmas) - 1
    rows = len(found.moments)
    if steps < 2 or any(high <= low for high, low in zip(found.sigmas, found.sigmas[1:], strict=False)):
        raise ValueError("sigmas do not fall")
    if rows not in (2 * steps, 3 * steps) or any(
        len(row) != index + 1 for index, row in enumerate(found.moments)
    ):
        raise ValueError(f"moments are not the triangle of one or two branches at {steps} steps")
    if len(found.gain) != steps:
        raise ValueError(f"{len(found.gain)} gains for {steps} steps")
    if not all(math.isfinite(value) for row in (found.gain, *found.moments) for value in row):
        raise ValueError("a number is not finite")
    if not isinstance(found.about, Mapping) or not {"weights_sha256", "guidance", "steps"} <= set(
        found.about
    ):
        raise ValueError("it does not say what it was measured on")
    if not all(isinstance(row.flexcache, Mapping) for row in found.table):
        raise ValueError("a row of the table names no cache")

"""One line of the table of step caches: a setting, and what it cost and kept."""

from __future__ import annotations

from dataclasses import dataclass

Mean = tuple[float, float, float]


@dataclass(frozen=True)
class Line:
    """A setting, over all its videos.

    Attributes:
        videos: that were made.
        saved: share of the transformer's forwards that were not run.
        faster: denoising seconds of full compute over this setting's.
        psnr, ssim: mean with its 95 % interval; None for full compute.
        adherence: share of asked parts that the judge finds; None where prompts name none.
        flicker: mean difference to full compute's, grey levels.
        kept_of_saving: seconds saved over what the skipped forwards cost in full compute; None where none was
            skipped.
        above: dB of the calibrated plan at this speed over this setting; None where no plan is that fast or
        slow. error: of its first failed video.
    """

    setting: str
    videos: int
    saved: float = 0.0
    faster: float = 1.0
    psnr: Mean | None = None
    ssim: Mean | None = None
    adherence: float | None = None
    flicker: float | None = None
    kept_of_saving: float | None = None
    above: float | None = None
    error: str | None = None

    @property
    def fewer(self) -> float:
        """Forwards of full compute over this setting's."""
        return 1 / (1 - self.saved)

"""Pictures of a finished video: its first frame, and a strip of several. Knows a file of frames; no jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image

from chitu_diffusion.files.atomic import new_file

_IN_STRIP = 8
_WIDTHS = {"thumbnail": 320, "spritesheet": 160}
_QUALITY = 80
_EFFORT = 2  # of 0 to 6: 3.4 times as fast as the usual 4, and files 3 % larger


def write_stills(video: Path) -> dict[str, Path]:
    """WebP files beside a video, by variant: `thumbnail`, at most 320 pixels wide, and `spritesheet`, at most
    eight frames, evenly spread, side by side.

    Raises:
        OSError: the video cannot be read, or a picture not be written.
    """
    try:
        frames = list(_spread(video))
    except av.error.FFmpegError as error:
        raise OSError(str(error)) from error
    strip = [_narrow(frame, _WIDTHS["spritesheet"]) for frame in frames]
    width, height = strip[0].size
    sheet = Image.new("RGB", (width * len(strip), height))
    for place, frame in enumerate(strip):
        sheet.paste(frame, (place * width, 0))
    pictures = {"thumbnail": _narrow(frames[0], _WIDTHS["thumbnail"]), "spritesheet": sheet}
    found = {}
    for variant, picture in pictures.items():
        found[variant] = video.with_name(f"{variant}.webp")
        with new_file(found[variant]) as part:
            picture.save(part, "WEBP", quality=_QUALITY, method=_EFFORT)
    return found


def _spread(video: Path) -> Iterator[Image.Image]:
    """The first frame, the last, and those between."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        count = max(1, stream.frames)
        some = min(count, _IN_STRIP)
        wanted = {place * (count - 1) // max(1, some - 1) for place in range(some)}
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield frame.to_image()


def _narrow(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    return picture.resize(
        (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.BOX
    )

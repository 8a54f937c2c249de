"""Files and folders appear whole or not at all, whatever ends their writer and whoever looks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from chitu_diffusion.files import atomic
from chitu_diffusion.files.atomic import new_file, new_folder, write_text
from chitu_diffusion.media.reading import read_frames
from chitu_diffusion.media.video import write_video

ROOT = Path(__file__).parents[1]

KILLED_AT = """
import errno, os, sys
from pathlib import Path
import numpy as np
from chitu_diffusion.files import atomic
from chitu_diffusion.errors import OutputError, UsageError
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.media.video import write_video

path, exchanges = sys.argv[1], sys.argv[2] == "exchanges"
if not exchanges:
    atomic._exchange = lambda a, b: False

def write(count):
    return write_video(np.zeros((count, 16, 16, 3), np.uint8), path, fps=8, recipe={"frames": count})

def killed(point):
    left = [point]
    def counted(function):
        def call(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
            return function(*args, **more)
        return call
    for owner, name in ((os, "rename"), (os, "replace"), (os, "mkdir"), (os, "open"), (os, "close"),
                        (os, "unlink"), (os, "rmdir"), (os, "fsync"), (atomic, "_exchange")):
        setattr(owner, name, counted(getattr(owner, name)))

def full(path):
    raise OSError(errno.ENOSPC, "No space left on device")

write(5)
point = 0
while True:
    child = os.fork()
    if child == 0:
        killed(point)
        write(9)
        os._exit(0)
    ended = os.waitpid(child, 0)[1] == 0
    if not exchanges and not os.path.exists(path):  # between two renames: what comes next brings it back
        sync, atomic._sync = atomic._sync, full
        try:
            write(13)
        except OutputError:
            pass
        atomic._sync = sync
    assert read_recipe(path)["frames"] == len(read_frames(path)) in (5, 9), point
    assert write(5)
    left = {entry for entry in os.listdir(Path(path).parent) if entry.startswith(".")}
    assert not left, (point, left)
    if ended:
        break
    point += 1
print(point)
"""


@pytest.mark.parametrize(
    ("name", "exchanges"), [("a.mp4", "-"), ("a.npy", "-"), ("f/", "exchanges"), ("f/", "-")]
)
def test_killed_at_every_point_the_older_stays_until_the_newer_stands(
    tmp_path: Path, name: str, exchanges: str
) -> None:
    """A kill at the first call of the operating system, at the second, ... until none is left."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, f"{tmp_path}/{name}", exchanges],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


def test_two_writers_and_every_look_finds_one_whole_video(tmp_path: Path) -> None:
    """As in case B6, for each kind: two processes write one name again and again, and a third looks."""
    code = (
        "import sys, numpy as np; from chitu_diffusion.media.video import write_video\n"
        "kind = int(sys.argv[2])\n"
        "print(flush=True)\n"
        "while True: write_video(np.full((5 + 4 * kind, 48, 48, 3), 90 * kind, np.uint8), sys.argv[1], fps=8)"
    )
    for name in ("a.mp4", "a.npy", "f/"):
        path = f"{tmp_path}/{name}"
        write_video(np.zeros((5, 48, 48, 3), np.uint8), path, fps=8)
        command = (sys.executable, "-c", code, path)
        writers = [
            subprocess.Popen([*command, str(kind)], cwd=ROOT, stdout=subprocess.PIPE) for kind in (0, 1)
        ]
        try:
            for writer in writers:
                writer.stdout.readline()
            seen = set()
            looks = 0
            while looks < 40 or (len(seen) < 2 and looks < 2000):
                frames = read_frames(path)
                kind = len(frames) // 4 - 1
                assert np.abs(frames.astype(int) - 90 * kind).max() <= 2, name
                seen.add(kind)
                looks += 1
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
                writer.stdout.close()
        assert seen == {0, 1}


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_an_error_leaves_nothing_not_even_folders(tmp_path: Path, new: object) -> None:
    with pytest.raises(KeyboardInterrupt), new(tmp_path / "a" / "b" / "c") as part:
        (part / "x" if part.is_dir() else part).write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_living_writer_is_left_alone_and_a_dead_one_swept(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    dead = tmp_path / ".a.txt.0123abcd.part"
    dead.write_text("half")
    other = tmp_path / ".b.txt.0123abcd.part"
    other.write_text("of another name")
    with new_file(target) as part:
        part.write_text("first")
        write_text(target, "second")
        assert part.exists()
        assert not dead.exists()
    assert target.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [other.name, "a.txt"]


def test_many_threads_of_one_process_write_one_name(tmp_path: Path) -> None:
    texts = [str(number) * 1000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in texts
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_has_the_rights_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_system_without_exchange_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    for text in ("old", "new"):
        with new_folder(tmp_path / "f") as part:
            (part / text).write_text(text)
    assert os.listdir(tmp_path) == ["f"]
    assert os.listdir(tmp_path / "f") == ["new"]

"""Where output goes: nothing that shows something else is replaced, a place that cannot be is refused before
anything is loaded, and `~` is the home; and how counts and errors read.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Chitu
from PIL import Image

from chitu_diffusion.config import EngineConfig, cache_dir, load_config
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import UsageError
from chitu_diffusion.executor.task_checkpoints import checkpoint_folder
from chitu_diffusion.files.places import expand_home, make_folder, require_writable
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.media.video import check_save_path, write_video
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.task import DiffusionUserParams

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.fixture
def generate(chitu: Chitu, tiny_folder: Path):
    def run(*words: object) -> tuple[int, str, str]:
        return chitu("generate", "cat", "--model", tiny_folder, "--steps", 1, *words)

    return run


# -- what stands there already


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "frames/"])
def test_a_video_that_shows_something_else_stays(generate, name: str) -> None:
    assert generate("-o", name, "--seed", 1)[0] == 0
    before = read_frames(name)
    for other in (("--seed", 2), (), ("--seed", 1, "--guidance-scale", 3)):
        for more in ((), ("--dry-run",)):
            code, out, err = generate("-o", name, *other, *more)
            assert (code, out) == (2, "") and "shows something else" in err and "--overwrite" in err
            assert "loading" not in err
    assert np.array_equal(read_frames(name), before)
    assert generate("-o", name, "--seed", 1)[0] == 0, "the same recipe may be made again"
    assert generate("-o", name, "--seed", 2, "--overwrite")[0] == 0
    assert read_recipe(name)["seed"] == 2


def test_a_file_of_something_else_stays_and_a_cut_one_goes(generate) -> None:
    Path("a.mp4").write_text("my notes")
    np.save("b.npy", np.arange(5))
    np.save("c.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save("d.npy", FRAMES)
    for name in ("a.mp4", "b.npy", "c.npy", "d.npy"):
        assert generate("-o", name)[0] == 2, name
    assert Path("a.mp4").read_text() == "my notes"
    for name, seed in (("cut.mp4", 2), ("cut.npy", 1)):  # an array's recipe lies beside it, and still counts
        generate("-o", name, "--seed", 1)
        Path(name).write_bytes(Path(name).read_bytes()[:500])
        assert generate("-o", name, "--seed", seed)[0] == 0


def test_reproduce_replaces_nothing_else(chitu: Chitu, generate, tiny_folder: Path) -> None:
    generate("-o", "a.npy", "--seed", 1)
    generate("-o", "b.npy", "--seed", 2)
    words = ("reproduce", "a.npy", "--model", tiny_folder)
    code, _, err = chitu(*words, "-o", "b.npy")
    assert code == 2 and "'b.npy' shows something else (seed 2, here 1)" in err and "loading" not in err
    assert chitu(*words)[0] == 0 and chitu(*words)[0] == 0, "its own earlier answer may be made again"
    assert chitu(*words, "-o", "b.npy", "--overwrite")[0] == 0
    assert read_recipe("b.npy")["seed"] == 1


def test_a_comparison_of_two_others_stays(chitu: Chitu) -> None:
    for name in ("a.npy", "b.npy", "c.npy"):
        write_video(FRAMES, name, fps=8)
    words = ("eval", "compare", "a.npy")
    assert chitu(*words, "b.npy")[0] == 0 and chitu(*words, "b.npy")[0] == 0
    code, _, err = chitu(*words, "c.npy")
    assert code == 2 and "of 'a.npy' and 'b.npy'" in err and "--overwrite" in err
    assert chitu(*words, "c.npy", "--overwrite")[0] == 0
    Path("own").mkdir()
    Path("own/contact.png").write_bytes(b"mine")
    assert chitu(*words, "c.npy", "-o", "own")[0] == 2 and Path("own/contact.png").read_bytes() == b"mine"


def test_a_comparison_that_cannot_be_says_why(chitu: Chitu) -> None:
    write_video(FRAMES, "a.npy", fps=8)
    write_video(FRAMES[:1, :16], "small.npy", fps=8)
    Path("text.mp4").write_text("hello")
    for other, said in (
        ("no.mp4", "error: there is no file 'no.mp4'\n"),
        ("text.mp4", "error: 'text.mp4' cannot be read: "),
        ("small.npy", "error: 'a.npy' has 5 frames of 32x32, and 'small.npy' 1 frame of 32x16: use videos"),
    ):
        code, out, err = chitu("eval", "compare", "a.npy", other)
        assert (code, out) == (2, "") and err.startswith(said) and "Errno" not in err, err
    assert not Path("outputs").exists()


# -- what cannot be


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("place", ["/proc/x.mp4", "/proc/new/x.mp4", "/sys/x.npy", "file/x.mp4", "file/"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_place_that_cannot_be_is_refused_at_once(generate, place: str, more: tuple[str, ...]) -> None:
    Path("file").write_text("")
    code, out, err = generate("-o", place, *more)
    assert (code, out) == (2, "") and err.startswith("error: -o '"), err
    assert "choose another" in err or "name a folder" in err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "words",
    [
        ("generate", "cat", "--profile", "/proc"),
        ("calibrate", "-o", "/proc"),
        ("eval", "cache", "-o", "/proc"),
        ("eval", "adherence", "-o", "/proc/x"),
        ("eval", "compare", "a.npy", "a.npy", "-o", "a.npy/x"),
    ],
)
def test_a_folder_that_cannot_be_written_into_is_refused_at_once(
    chitu: Chitu, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    write_video(FRAMES, "a.npy", fps=8)
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, err = chitu(*words)
    assert code == 2 and "use another folder" in err and "unexpected" not in err, err


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    before = os.stat(tmp_path).st_mtime_ns
    require_writable(tmp_path)
    check_save_path(tmp_path / "a" / "b.mp4")
    assert list(tmp_path.iterdir()) == [] and os.stat(tmp_path).st_mtime_ns == before


@pytest.mark.parametrize("together", ["one path", "two requests"])
def test_two_videos_of_one_name_are_refused(make_config, tiny_folder: Path, together: str) -> None:
    requests = [DiffusionUserParams("a cat", save_path=path) for path in ("x.npy", "./x.npy")]
    with Engine(make_config(tiny_folder)) as engine:
        with pytest.raises(UsageError, match="for 2 videos, of which one would be left"):
            if together == "one path":
                engine.generate(["a", "b"], save_path="x.mp4")
            else:
                engine.generate(requests)
        assert len(engine.pool) == 0


# -- the home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_home_stands_in_every_path_of_python(home: Path, make_config, tiny_folder: Path) -> None:
    Image.fromarray(FRAMES[0]).save(home / "a.png")
    (home / "c.toml").write_text('[output]\ndir = "~/videos"\n')
    shutil.copytree(tiny_folder, home / "model")
    params = DiffusionUserParams("a cat", save_path="~/x/", image="~/a.png")
    assert params.save_path == f"{home}/x/" and params.image.path == str(home / "a.png")
    assert DiffusionUserParams("a cat", save_path=Path("~/x.mp4")).save_path == home / "x.mp4"
    assert load_config("~/c.toml")[0].output.dir == f"{home}/videos"
    assert EngineConfig(output={"dir": "~/videos"}).output.dir == f"{home}/videos"
    assert load_config(flags={"output.dir": "~/v"})[0].output.dir == f"{home}/v"
    assert resolve_model("~/model").required().path == home / "model"
    assert resolve_model("wan-tiny", "~/model").required().path == home / "model"
    assert checkpoint_folder("~/saved") == home / "saved"
    assert cache_dir({"CHITU_CACHE_DIR": "~/cache"}) == home / "cache"
    with Engine(make_config(tiny_folder)) as engine:
        result = engine.generate("a cat", num_inference_steps=1, save_path="~/first.npy")
        assert result.save("~/second.npy") == home / "second.npy"
        task = engine.submit("a cat", num_inference_steps=1, save_path="~/third.npy")
        assert task.wait() and task.buffer.save_path == str(home / "third.npy")
    assert {"first.npy", "second.npy", "third.npy"} <= {file.name for file in home.iterdir()}
    assert len(read_frames("~/first.npy")) == 5 and read_recipe("~/second.npy")["prompt"] == "a cat"
    assert not Path("~").exists()


def test_the_home_stands_in_every_path_of_the_command_line(home: Path, capsys, tiny_folder: Path) -> None:
    from chitu_diffusion.cli.app import run

    shutil.copytree(tiny_folder, home / "model")
    (home / "p.txt").write_text("a cat\n")
    (home / "c.toml").write_text("[infer]\nthreads = 1\n")
    own = ("--model", "~/model", "--steps", "1", "--config", "~/c.toml", "--set", "output.dir=~/many")
    assert run(["generate", "a cat", *own]) == 0
    assert run(["generate", "a cat", *own, "-o", "~/a.npy", "--profile", "~/profile"]) == 0
    assert run(["batch", "~/p.txt", *own, "-o", "~/rows"]) == 0
    assert run(["reproduce", "~/a.npy", "--model", "~/model", "-o", "~/b.npy"]) == 0
    assert run(["info", "~/a.npy"]) == 0
    assert run(["models", "convert", "~/model", "~/official"]) == 0
    assert run(["eval", "compare", "~/a.npy", "~/b.npy", "-o", "~/compared"]) == 0
    made = {file.name for file in home.iterdir()}
    assert made >= {"a.npy", "b.npy", "many", "profile", "rows", "official", "compared"}
    assert not Path("~").exists()


def test_what_is_no_home_stays() -> None:
    for name in ("a~", "x/~", "~nobody-of-that-name/x", "", None, 3):
        assert expand_home(name) == name


# -- words


def test_a_flag_is_named_once(chitu: Chitu, tiny_folder: Path) -> None:
    Image.fromarray(FRAMES[0]).save("a.png")
    err = chitu("generate", "cat", "--model", tiny_folder, "--image", "a.png")[2]
    assert err.startswith("error: --image: random-tiny is a text to video model"), err


def test_possible_options_end_with_a_stop(chitu: Chitu) -> None:
    err = chitu("generate", "cat", "--seeds", 3)[2]
    assert "--steps). 'chitu generate --help' lists" in err


def test_a_drawn_seed_is_told_once(generate) -> None:
    err = generate("-o", "a.npy")[2]
    assert err.count(f"seed {read_recipe('a.npy')['seed']}") == 1


@pytest.mark.parametrize("lacks", [1, 2])
def test_the_doctor_counts(chitu: Chitu, monkeypatch: pytest.MonkeyPatch, lacks: int) -> None:
    from chitu_diffusion.cli import doctor

    names = {name: name for name in doctor.LIBRARIES}
    missing = tuple(f"no-such-{number}" for number in range(lacks))
    monkeypatch.setattr(doctor, "LIBRARIES", (*names, *missing))
    code, _, err = chitu("doctor")
    assert code == 1 and f"{lacks} thing{'s' if lacks > 1 else ''} lacking" in err


def test_no_error_shows_its_number(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "somewhere")

    monkeypatch.setattr("chitu_diffusion.media.reading.read_recipe", broken)
    err = chitu("info", "a.mp4")[2]
    assert "Errno" not in err and "'somewhere': No such file or directory" in err


def test_make_folder_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--profile .*Not a directory; use another folder"):
        make_folder("--profile", tmp_path / "file" / "x")

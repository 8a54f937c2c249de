"""Whatever stands in a file that others wrote, we answer in our own words, soon, and in bounded memory.

Seeds are fixed: a failure names its case and can be run again.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from card import Card
from fuzzing import changed, linked_copy, most_memory, spoil, within

from chitu_diffusion.cli.batch import read_rows
from chitu_diffusion.cli.reproduce import _request_of, _settings_of
from chitu_diffusion.config import load_config
from chitu_diffusion.errors import ChituError, UsageError
from chitu_diffusion.media.reading import read_frames, read_recipe
from chitu_diffusion.media.video import write_video
from chitu_diffusion.models.convert import convert, verify
from chitu_diffusion.models.kinds import Role
from chitu_diffusion.models.loading import load_part
from chitu_diffusion.models.registry import resolve_model
from chitu_diffusion.pipelines.request import resolve_task
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

MOST_SECONDS = 5.0
"""Of one case, which takes some 30 ms: what hangs, hangs for longer."""
MOST_MEMORY = 500 * 2**20
"""Bytes that all cases together may take on top: the largest file that is read is some 10 KiB here."""

PICTURE = np.zeros((40, 60, 3), np.uint8)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    before = most_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert most_memory() - before < MOST_MEMORY


def refused(case: str, kinds: type[ChituError], call: Callable[[], Any]) -> bool:
    """Whether it raises one of these errors, with words; any other error fails."""
    said = None
    with within(MOST_SECONDS, case):
        try:
            call()
        except kinds as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{case}: raw {type(error).__name__}: {error}") from error
    assert said is None or 10 < len(said) < 8000, case
    return said is not None


def use_model(folder: Path, name: str, *, whole: bool) -> None:
    """What a command does with a folder up to the first step; of its parts, those that `name` is in."""
    model = resolve_model(str(folder))
    images = {"image": PICTURE, "last_image": PICTURE} if model.spec.kind.takes_image else {}
    task = DiffusionTask.from_user_request(DiffusionUserParams("a cat", seed=1, **images))
    resolve_task(task, model.spec, "outputs")
    roles = roles_of(name)
    if whole or not roles:
        findings = verify(folder)
        assert findings and all(finding.message for finding in findings)
    for role in roles:
        part = load_part(model.required(), role)
        if role == "text_encoder":
            part.encode(["a red cat"])
        if role == "image_encoder":
            part.encode([("a picture", partial(part.preprocessing.cropped, PICTURE))])


def roles_of(name: str) -> tuple[Role, ...]:
    """The parts that a file of either layout belongs to."""
    if name == "config.json" or name.startswith(("transformer", "diffusion")):
        return ("transformer",)
    if name.startswith(("text_encoder", "tokenizer", "google", "models_t5")):
        return ("text_encoder",)
    if name.startswith(("image_", "models_clip")):
        return ("image_encoder",)
    return ("vae",) if name.startswith(("vae", "Wan2.1_VAE")) else ()


@pytest.fixture(scope="module")
def layouts(tiny_folder: Path, frames_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A text-to-video model, and one with an image encoder, each in both layouts."""
    home = tmp_path_factory.mktemp("layouts")
    models = {"official": tiny_folder, "official-frames": frames_folder}
    official = [convert(folder, home / name, "official").path for name, folder in models.items()]
    return [tiny_folder, official[0], frames_folder, official[1]]


def test_300_spoilt_model_folders(layouts: list[Path], tmp_path: Path, card: Card) -> None:
    chance = random.Random(1)
    bad = 0
    for number in range(300):
        source = layouts[number % 4]
        names = sorted(str(file.relative_to(source)) for file in source.rglob("*") if file.is_file())
        name = chance.choice([name for name in names if name.endswith(".json")] * 2 + names)
        file = linked_copy(source, tmp_path / str(number), name)
        case = f"case {number}, {source.name}/{name}, {spoil(file, chance, is_json=name.endswith('.json'))}"
        bad += refused(
            case,
            ChituError,
            lambda n=name, f=tmp_path / str(number), w=number % 10 == 0: use_model(f, n, whole=w),
        )
    card.add(cases=300, refused=bad, raw_errors=0)
    assert bad > 150  # most changes matter


def test_300_spoilt_recipes_and_videos(tmp_path: Path, card: Card) -> None:
    chance = random.Random(2)
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    params = DiffusionUserParams("a cat", seed=1, height=16, width=16).to_mapping()
    recipe = {"prompt": "a cat", "seed": 1, "params": params, "model": "wan-tiny", "dtype": "float32"}
    names = ("a.mp4", "a.gif", "a.npy", "frames/")
    bad = 0
    for number in range(300):
        place = tmp_path / str(number)
        place.mkdir()
        name = names[number % 4]
        said = recipe if number % 2 else changed(recipe, chance)
        path = write_video(frames, f"{place}/{name}", fps=8, recipe=_writable(said))
        case = f"case {number}, {name}, {said if said is not recipe else ''}"
        if number % 2:
            entries = sorted(path.iterdir()) if path.is_dir() else sorted(place.iterdir())
            file = chance.choice(entries)
            case += spoil(file, chance, is_json=file.suffix == ".json")

        def use(path: Path = path) -> None:
            found = read_recipe(path)
            load_config(None, _settings_of(found), {})
            _request_of(found, {})

        bad += refused(case, UsageError, use)
        bad += refused(case, UsageError, lambda path=path: read_frames(path))
    card.add(cases=300, refused=bad, raw_errors=0)
    assert bad > 100


def _writable(recipe: Any) -> Any:
    """What a writer can put into a file: text without half pairs, an object."""
    text = json.dumps(recipe if isinstance(recipe, dict) else {"params": recipe})
    return json.loads(text.replace("\\ud800", "?"))


def test_200_spoilt_batch_files(tmp_path: Path, card: Card) -> None:
    chance = random.Random(3)
    rows = [{"prompt": "a cat", "seed": 1, "num_frames": 5, "guidance_scale": 2.5}, {"prompt": "a dog"}]
    texts = {
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".csv": 'prompt,seed,num_frames,guidance_scale\n"a cat, red",4,5,2.5\ndog,,,\n',
        ".txt": "a cat\n# no\na dog\n",
    }
    bad = 0
    for number in range(200):
        ending = chance.choice(sorted(texts))
        file = tmp_path / f"{number}{ending}"
        file.write_text(texts[ending])
        case = f"case {number}{ending}"
        if ending == ".jsonl" and chance.random() < 0.6:
            spoilt = [changed(row, chance) for row in rows]
            file.write_text("\n".join(map(json.dumps, spoilt)))
            case += f" {spoilt}"
        else:
            case += spoil(file, chance, is_json=False)
        bad += refused(
            case, UsageError, lambda file=file: read_rows(file, tmp_path, {}, DiffusionTask.from_user_request)
        )
    card.add(cases=200, refused=bad, raw_errors=0)
    assert bad > 80


def test_1000_odd_requests(tiny_folder: Path, card: Card) -> None:
    chance = random.Random(4)
    spec = resolve_model(str(tiny_folder)).spec
    usual = {
        **DiffusionUserParams("a cat", seed=1, height=32, width=32, num_frames=5).to_mapping(),
        "flexcache": {"strategy": "teacache", "threshold": 0.1},
        "cascade": [{"height": 32, "width": 32, "num_inference_steps": 2}],
    }
    fields = [name for name in usual if name not in ("image", "last_image")]
    bad = 0
    for number in range(1000):
        asked = dict(usual)
        for name in chance.sample(fields, chance.randint(1, 3)):
            asked[name] = changed(usual[name], chance)
        if chance.random() < 0.5:
            asked.update(flexcache=None, cascade=None)

        def use(asked: dict[str, Any] = asked) -> None:
            task = DiffusionTask.from_user_request(DiffusionUserParams.from_mapping(asked))
            resolve_task(task, spec, "outputs")

        bad += refused(f"case {number} {asked}"[:3000], ChituError, use)
    card.add(cases=1000, refused=bad, raw_errors=0)
    assert bad > 500


@pytest.mark.parametrize(
    "content", ["a = " + "[" * 100_000, "a = 1" + "0" * 5000, "\ud800", "[infer]\ndtype=[]"]
)
def test_odd_settings_files(content: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert refused(content[:20], UsageError, lambda: load_config(file, {}, {}))
    assert refused("device", UsageError, lambda: load_config("/dev/full", {}, {}))

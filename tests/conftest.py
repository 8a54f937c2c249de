"""What every test may use: one thread, random tiny models on disk, and the folder of the shipped one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from card import Card, write_line
from fronts import front, supervisor  # noqa: F401
from job_stores import fake_clock, fresh_url, job_store, postgres  # noqa: F401
from long_tests import LONG

from chitu_diffusion.cli.app import run
from chitu_diffusion.config import EngineConfig

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; it decides when a kernel is defined, which is before any test
    os.environ.setdefault("TRITON_INTERPRET", "1")

# started in the background of a script, this process would ignore Ctrl+C, and so would all that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

WAN_TINY = Path(__file__).parent.parent / "chitu_diffusion" / "assets" / "wan-tiny"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--card", metavar="FILE", help="figures for docs/reliability.md go there; long loops")
    parser.addoption("--quick", action="store_true", help="leave out what tests/long_tests.py names")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--card")), "card")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick the long tests are skipped, and say so."""
    if config.getoption("--quick"):
        for item in items:
            if item.nodeid.removeprefix("tests/").startswith(LONG):
                item.add_marker(pytest.mark.skip(reason="takes long: make test-all"))


class Outcomes:
    """How each test ended, told to the card; by the process that collects from the others, if there are."""

    def __init__(self, file: str | None) -> None:
        self._file = file if "PYTEST_XDIST_WORKER" not in os.environ else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            told = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            write_line(self._file, told)


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Card:
    """Takes this test's figures for the reliability card."""
    return Card(request.config.getoption("--card"), request.node.nodeid)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Functions by name: their addresses are other ones in each worker."""
    return val.__name__ if isinstance(val, FunctionType) else None


def pytest_collection_finish() -> None:
    """What was imported stays: closing an engine, which collects garbage, then looks at the rest alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with one transformer (see `tiny_model`)."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def two_experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with two different transformers, boundary 0.875, shift 12."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "experts", experts=2, shift=12.0, seed=1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image-to-video model with one transformer."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "image", image=True, seed=2)


@pytest.fixture(scope="session")
def image_experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image-to-video model with two different transformers, as Wan2.2-I2V-A14B has."""
    from tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / "image-experts"
    return write_tiny_model(folder, image=True, experts=2, shift=5.0, seed=3)


@pytest.fixture(scope="session")
def frames_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model between two images with an image encoder, as Wan2.1-FLF2V-14B is."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "frames", image=True, clip=2, seed=6)


@pytest.fixture(scope="session")
def control_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of controlled video, as Wan2.1-VACE is."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "control", control=True, seed=7)


RunText = Callable[[str], None]


@pytest.fixture
def runs_for_hopper(tmp_path: Path) -> RunText:
    """Runs a text of Python that compiles Triton's kernels with `hopper.build`; its first argument is a
    folder. Skips without triton's assembler."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this triton has no assembler for NVIDIA")
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here.parent), str(here)))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_INTERPRET": "0",
    }

    def run_text(text: str) -> None:
        command = [sys.executable, "-c", text, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    return run_text


MakeConfig = Callable[..., EngineConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Settings for a model folder on the CPU, with outputs in the test's own folder; more as dotted names
    with '__'.
    """

    def make(folder: Path, **more: object) -> EngineConfig:
        args = EngineConfig(
            models={"name": str(folder)},
            output={"dir": str(tmp_path / "outputs")},
            infer={"device": "cpu", "dtype": "float32"},
        )
        for dotted, value in more.items():
            *path, last = dotted.split("__")
            branch = args
            for part in path:
                branch = getattr(branch, part)
            setattr(branch, last, value)
        return args

    return make


Answer = tuple[int, str, str]
Chitu = Callable[..., Answer]


@pytest.fixture
def chitu(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chitu:
    """Runs a command line in a fresh folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Answer:
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the engine fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a bad value reached the engine")

    monkeypatch.setattr("chitu_diffusion.cli.runner.run_jobs", refuse)


@pytest.fixture
def gelu_apart(monkeypatch):
    """GELU outside oneDNN's product, as the compiler has it on a CPU: then compiled and not compiled agree to
    the bit.
    """
    from chitu_diffusion.ops import fused

    monkeypatch.setattr(fused, "_ONEDNN", False)

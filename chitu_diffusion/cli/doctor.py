"""`chitu doctor`: what this machine can run, and for each lack what to do about it.

Each check is a small function from nothing to findings. A check that itself breaks becomes a
finding, so that the doctor always ends with an answer.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chitu_diffusion.cli.console import emit_document, printable, say, size, table
from chitu_diffusion.cli.flags import Args, takes_flags
from chitu_diffusion.cli.info import Document
from chitu_diffusion.distributed.host import usable_cores
from chitu_diffusion.errors import ChituError, UsageError, counted
from chitu_diffusion.files.places import temporary_folder, why_not_writable
from chitu_diffusion.memory.control_groups import main_memory

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.models.registry import FoundModel

Status = Literal["ok", "note", "lack"]
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "av", "pydantic")
TINY_NEEDS = 2 * 2**30
"""Bytes of free memory that the shipped model is promised to do with."""
DISK_NEEDS = 2**30
_SETTINGS = "settings"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: "ok"; "note" where something optional is absent; "lack" where nothing can be generated.
        found: what there is.
        remedy: what to do about it; empty when there is nothing to do, or nothing that would help here.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


@takes_flags
def doctor(args: Args, json_: Document = False) -> int:
    """Show what this machine can run; each lack comes with its remedy. Exit 1 if nothing can be
    generated, 4 if it is for the model alone, 2 for the settings.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "libraries": _libraries,
        "memory": _memory,
        "disk": _disk,
        "folders": _folders,
        "devices": _devices,
        "attention": _attention,
        "video": _video,
        "models": lambda: _models(args),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings += check()
        except Exception as error:  # recorded as a finding
            findings.append(
                Finding(name, "lack", f"the check broke: {type(error).__name__}: {error}", "please report it")
            )
    lacks = [finding for finding in findings if finding.status == "lack"]
    codes = {2 if lack.name == _SETTINGS else 4 if lack.name.startswith("model ") else 1 for lack in lacks}
    code = min(codes, default=0)
    if json_:
        emit_document({"ok": not lacks, "findings": [asdict(finding) for finding in findings]})
        return code
    if sys.stdout.isatty():
        table(("what", "", "found", "remedy"), [(f.name, f.status, f.found, f.remedy) for f in findings])
    else:
        print("\n".join(map(_line, findings)))
    say(
        f"{counted(len(lacks), 'thing')} lacking, see the remedies"
        if lacks
        else 'ready: chitu generate "A cat walking on grass"'
    )
    return code


def _line(finding: Finding) -> str:
    """For a pipe: a finding is a line, its status first."""
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    return printable(f"{finding.status:<5} {finding.name}: {finding.found}{remedy}")


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("python", "ok" if good else "lack", found, "" if good else "install Python 3.11 or later")


def _libraries() -> Iterator[Finding]:
    for name in LIBRARIES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "lack", "not installed", "pip install -e . -c constraints.txt")


def _memory() -> Iterator[Finding]:
    total, free = main_memory()
    enough = free >= TINY_NEEDS
    remedy = "" if enough else f"wan-tiny needs {size(TINY_NEEDS)}; end something, or use more memory"
    status: Status = "ok" if enough else "note" if total >= TINY_NEEDS else "lack"
    yield Finding("main memory", status, f"{size(free)} of {size(total)} free", remedy)
    yield Finding("cpu", "ok", f"{usable_cores()} cores")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= DISK_NEEDS
    yield Finding(
        "disk here",
        "ok" if enough else "note",
        f"{size(free)} free",
        "" if enough else "free some space for videos",
    )


def _folders() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from chitu_diffusion.config import cache_dir

    forgets = "nothing is remembered between runs, and one that is cut short starts over"
    for name, folder, remedy in (
        ("this folder", Path.cwd(), "name a place with -o, such as -o ~/cat.mp4"),
        ("cache folder", cache_dir(), f"{forgets}; name one with CHITU_CACHE_DIR"),
        ("temporary folder", temporary_folder(), "name one with TMPDIR; infer.compile wants it"),
        ("hub cache", Path(HF_HUB_CACHE), "'chitu models pull NAME --to DIR' takes another place"),
    ):
        problem = "there is none" if folder is None else why_not_writable(folder)
        if problem is None:
            yield Finding(name, "ok", f"{folder}, writable")
        else:
            yield Finding(name, "note", f"{folder or 'none'}: {problem}", remedy)


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        ask = "see why its driver does not answer (nvidia-smi)" if built else "install torch's CUDA build"
        remedy = f"if this machine has an NVIDIA GPU, {ask}"
        yield Finding("gpu", "note", "none that torch can use; the CPU runs wan-tiny", remedy)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        compute = f"compute {facts.major}.{facts.minor}"
        yield Finding(f"cuda:{index}", "ok", f"{facts.name}, {compute}, {size(free)} of {size(total)} free")


def _attention() -> Iterator[Finding]:
    from chitu_diffusion.attention import KERNELS, candidates
    from chitu_diffusion.backend import pick_device, pick_dtype

    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    automatic = {kernel.name for kernel in candidates(device, dtype)}
    for name, kernel in KERNELS.items():
        about = ("exact" if kernel.exact else "lossy, by name only") + (
            ", for ring attention too" if kernel.supports_ring else ""
        )
        if name in automatic:
            about += ", the automatic choice" if len(automatic) == 1 else ", timed by auto"
        unmet = kernel.requires.unmet(device, dtype)
        if unmet is None:
            yield Finding(f"attention {name}", "ok", about)
        else:
            found = f"{about}; not here: {unmet.reason}"
            remedy = "" if kernel.requires.unmet_by_device(device) else unmet.remedy
            yield Finding(f"attention {name}", "note", found, remedy)


def _video() -> Iterator[Finding]:
    import av

    libraries = ", ".join(
        f"{name} {'.'.join(map(str, number))}" for name, number in sorted(av.library_versions.items())[:3]
    )
    if "libx264" in av.codecs_available:
        yield Finding("mp4", "ok", f"libx264 through PyAV {av.__version__} ({libraries})")
    else:
        remedy = (
            "pip install --force-reinstall av (its wheels bring libx264), or write .gif, .npy or a folder"
        )
        yield Finding("mp4", "lack", f"PyAV {av.__version__} without libx264", remedy)


def _models(args: Args) -> Iterator[Finding]:
    import torch

    from chitu_diffusion.models.loading import check_folder
    from chitu_diffusion.models.registry import model_of, resolve_model
    from chitu_diffusion.models.wan.presets import FULL_SIZE

    name = args["model"] or "by the settings"
    try:
        settings, _ = args.load_config()
        name = settings.models.name
        model = model_of(settings.models)
        found, problem = _outlook(settings, model)
    except UsageError as error:
        yield Finding(_SETTINGS, "lack", str(error), "'chitu config show' tells where each came from")
        return
    except ChituError as error:
        yield Finding(f"model {name}", "lack", str(error), "chitu models ls")
        return
    if problem is None:
        yield Finding(f"model {name}", "ok", found)
    else:
        remedy = "choose a smaller size, fewer frames, or wan-tiny"
        yield Finding(f"model {name}", "note", f"{found}; its default video: {problem}", remedy)
    slow = "" if torch.cuda.is_available() else ", very slow without a GPU"
    for other in FULL_SIZE.values():
        if other.name != model.spec.name:
            try:
                _, place = resolve_model(other.name)
                if place is not None:
                    check_folder(place)
                what = f"{place.path}, whole" if place else "not on this machine"
            except ChituError as error:
                place = None
                what = str(error)
            remedy = "" if place else f"optional{slow}: chitu models pull {other.name}"
            yield Finding(f"model {other.name}", "ok" if place else "note", what, remedy)


def _outlook(settings: EngineConfig, model: FoundModel) -> tuple[str, str | None]:
    """Where a model lies, and what its default video needs; and why it cannot be made, None where it can."""
    from chitu_diffusion.pipelines.preflight import preflight
    from chitu_diffusion.task import DiffusionTask, DiffusionUserParams

    found = f"{model.required().path}, whole"
    if model.spec.kind.needs_image:
        preflight(settings, model, (), None)
        return found, None
    task = DiffusionTask.from_user_request(DiffusionUserParams("a cat"))
    here = preflight(settings, model, [task], None)
    outlook = here.outlooks[task.task_id]
    if outlook.memory is None:
        return found, str(outlook.problem)
    needs = (
        f"needs about {size(outlook.memory.device)} on {here.device} at memory level {outlook.memory.level}"
    )
    return f"{found}; its default video {needs}, in {here.dtype}", None

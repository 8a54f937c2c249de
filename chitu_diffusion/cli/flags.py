"""Every flag of the commands that make or measure videos: one row of `FLAGS` each.

A row says what stands in the help, how the text is read and where the value goes. The commands'
options, the request's fields, the engine's settings and the flags' names in error messages all
follow from the rows. What a flag does is its command's matter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from chitu_diffusion.cli import completion, options
from chitu_diffusion.cli.console import be_quiet
from chitu_diffusion.errors import ModelMissingError, UsageError
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.sampling.registry import AUTO, SAMPLER_HELP

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig, Origins

Result = TypeVar("Result")


@dataclass(frozen=True)
class Flag:
    """One row. With neither `field` nor `setting`, the command reads the value: `args["gpus"]`.

    Attributes:
        names: as they are typed: "--frames", or "-o --output".
        commands: names of the functions that take it: "generate batch".
        help: a sentence.
        type: of the value: str, int, float, bool, Path, or list[str] for a repeatable flag.
        field: of `DiffusionUserParams`; "width height" for a pair of values.
        setting: dotted name in `EngineConfig`; "*" where `parse` gives several, by name.
        parse: what makes a value of the text; raises UsageError with the flag's name.
        default, metavar, min, max: as in `typer.Option`.
        complete: what the shell may put for the beginning of a value; None leaves it to the shell.
    """

    names: str
    commands: str
    help: str
    type: Any = str
    field: str = ""
    setting: str = ""
    parse: Callable[[Any], Any] | None = None
    default: Any = None
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    complete: Callable[[str], list[str]] | None = None

    @property
    def key(self) -> str:
        """Its name in `Args`: "dry_run" for "--dry-run"."""
        return self.names.split()[-1].lstrip("-").replace("-", "_")

    def parameter(self) -> inspect.Parameter:
        """As a parameter of a command's function, which is how typer takes an option."""
        default = False if self.type is bool else self.default
        option = typer.Option(
            default,
            *self.names.split(),
            help=self.help,
            metavar=self.metavar,
            min=self.min,
            max=self.max,
            autocompletion=self.complete,
        )
        kind = self.type | None if default is None else self.type
        return inspect.Parameter(self.key, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)

    def parsed(self, typed: Any) -> Any:
        """The value of what typer read; None stays None."""
        value = typed if typed is None or self.parse is None else self.parse(typed)
        return expand_home(value) if self.type is Path else value


_MODELS = "generate batch calibrate doctor reproduce"

# In the order of the help. The formatter would spread a row over as many lines as it has values.
# fmt: off
FLAGS = (
    Flag("-o --output", "generate", "NAME.mp4, .gif, .npy, or NAME/ for a folder of png frames.",
         field="save_path", metavar="FILE"),
    Flag("-o --output", "batch", "Folder for the videos.", Path, default=Path("outputs"), metavar="DIR"),
    Flag("-o --output", "reproduce", "NAME-again beside the file by default.", Path, metavar="FILE"),
    Flag("-o --output", "calibrate", "Not beside the model, but here.", Path, metavar="DIR"),
    Flag("--model", _MODELS,
         "A name ('chitu models ls'), a Hugging Face id, a folder, or a transformer's file.",
         setting="models.name", complete=completion.models),
    Flag("--low-noise-model", f"{_MODELS} models_verify models_convert",
         "Of a model that is a file: its second expert's; none: both are merged into one.",
         setting="models.low_noise_model", metavar="FILE"),
    Flag("--text-encoder", f"{_MODELS} models_verify models_convert",
         "Likewise; else found in text_encoders/ near it.", setting="models.text_encoder", metavar="FILE"),
    Flag("--vae", f"{_MODELS} models_verify models_convert", "Likewise; else found in vae/ near it.",
         setting="models.vae", metavar="FILE"),
    Flag("--image-encoder", f"{_MODELS} models_verify models_convert",
         "Likewise; else found in clip_vision/ near it.", setting="models.image_encoder", metavar="FILE"),
    Flag("--tokenizer", f"{_MODELS} models_verify models_convert",
         "Likewise; else in the text encoder's file, or near it.", setting="models.tokenizer",
         metavar="FOLDER"),
    Flag("--prompts", "calibrate", "One prompt a line, twelve or so.", Path, metavar="FILE"),
    Flag("--negative-prompt", "generate batch", "What the video should not be.", field="negative_prompt",
         parse=options.parse_text),
    Flag("--image", "generate batch calibrate reproduce", "The first frame, for a model that takes one.",
         field="image", metavar="FILE"),
    Flag("--last-image", "generate batch calibrate reproduce", "The last frame, likewise.",
         field="last_image", metavar="FILE"),
    Flag("--image-preprocessing", "generate batch",
         "How images are resized: diffusers, or official, as Wan's authors do it.",
         field="image_preprocessing", metavar="NAME"),
    Flag("--video", "generate batch reproduce",
         "To be made anew, or VACE's control video: .mp4, .mov, .webm, .gif, .npy, or a folder of pngs.",
         field="video", metavar="FILE"),
    Flag("--mask", "generate batch reproduce",
         "Of a control video (VACE): white is made anew, black kept; a video, or a picture for all frames.",
         field="mask", metavar="FILE"),
    Flag("--reference-image", "generate batch reproduce",
         "A picture of what a VACE model shall show; repeatable.", list[str],
         field="reference_images", parse=options.parse_files, metavar="FILE"),
    Flag("--conditioning-scale", "generate batch",
         "Weight of control video, mask and reference images; 1 is usual.", float,
         field="conditioning_scale", metavar="S"),
    Flag("--strength", "generate batch", "How much of a video is made anew, 0.01 to 1; 0.8 is usual.", float,
         field="strength", metavar="S"),
    Flag("--lora", "generate batch reproduce",
         "An adapter: FILE or a shipped one's name, FILE:0.8; FILE@high, FILE@low for one of two experts; "
         "repeatable.", list[str],
         field="lora", parse=options.parse_files, metavar="FILE[:STRENGTH]", complete=completion.adapters),
    Flag("--size", "generate batch calibrate", "Pixels, multiples of 8: 832x480.",
         field="width height", parse=options.parse_size, metavar="WxH"),
    Flag("--frames", "generate batch calibrate", "Length in frames, 4n+1: 33, 81.", int, field="num_frames"),
    Flag("--fps", "generate batch", "Frames per second of the file: 24, 23.976, 24000/1001.",
         field="fps", metavar="N"),
    Flag("--steps", "generate batch calibrate", "Denoising steps.", int, field="num_inference_steps"),
    Flag("--sampler", "generate batch calibrate", f"{AUTO}: the model's own; {SAMPLER_HELP}.",
         setting="infer.sampler", metavar="NAME", complete=completion.samplers),
    Flag("--recipe", "generate batch",
         "How step-distilled weights are sampled: lightx2v-4step, fastwan, rcm, .. Known files tell it.",
         field="sampler_recipe", metavar="NAME", complete=completion.recipes),
    Flag("--guidance-scale", "generate batch calibrate",
         "Weight of the prompt: 5; or HIGH,LOW for two experts.",
         field="guidance_scale", parse=options.parse_guidance, metavar="G"),
    Flag("--shift", "generate batch calibrate", "Of the noise schedule; 3 to 12 is usual.", float,
         field="shift", metavar="S"),
    Flag("--seed", "generate", "One seed, or one video for each.",
         field="seed", parse=options.parse_seeds, metavar="N | A..B"),
    Flag("--seed", "batch", "For every row that names none.", int, field="seed"),
    Flag("--seeds", "calibrate", "Of the runs that are fitted.",
         parse=options.parse_seeds, default="0", metavar="A..B"),
    Flag("--cache", "generate batch", "A lossy feature cache: teacache:threshold=0.1.",
         field="flexcache", parse=options.parse_cache, metavar="NAME[:KEY=VALUE,..]",
         complete=completion.caches),
    Flag("--attention", "generate batch", "The attention kernel; auto is the fastest exact one.",
         setting="infer.attn_type", metavar="KERNEL", complete=completion.kernels),
    Flag("--attn-schedule", "generate batch", "Another kernel for the later steps: fa3_fp8@50%, sage@10.",
         setting="infer.attn_schedule", metavar="KERNEL@AFTER"),
    Flag("--fidelity", "generate batch", "The fastest calibrated plan that keeps this PSNR: 35dB.",
         parse=options.parse_fidelity, metavar="DB"),
    Flag("--speedup", "generate batch", "The calibrated plan of this speed: 2.", float, metavar="X"),
    Flag("--low-mem-level", "generate batch reproduce",
         "0 all resident .. 4 blocks streamed; each level needs less memory.", int,
         setting="infer.diffusion.low_mem_level"),
    Flag("--dtype", "generate batch calibrate", "auto, float32, bfloat16 or float16.",
         setting="infer.dtype", complete=completion.dtypes),
    Flag("--quant", "generate batch", "none, or fp8: linear layers in 8 bits, faster and lossy.",
         setting="infer.quant"),
    Flag("--device", "generate batch calibrate reproduce", "auto, cpu, cuda or cuda:N.",
         setting="infer.device", complete=completion.devices),
    Flag("--quality", "generate batch", "Of the mp4: 0 smallest .. 10 no visible loss.", int,
         setting="output.quality"),
    Flag("--workers", "calibrate", "Processes that share the device.", int, default=1, min=1, max=64),
    Flag("--gpus", "generate batch reproduce", "Share the work over N local processes.", int,
         min=1, metavar="N"),
    Flag("--parallel", "generate batch reproduce",
         "auto, or cfg2, u4, r2, cfg2u2r2 (CFG x Ulysses x ring).",
         setting="*", parse=options.parse_parallel, metavar="LAYOUT"),
    Flag("--config", "generate batch doctor config_show reproduce", "Settings from a TOML file.", Path,
         metavar="FILE"),
    Flag("--set", "generate batch calibrate config_show reproduce",
         "Any setting ('chitu config show'); repeatable.",
         list[str], setting="*", parse=options.parse_settings, metavar="A.B=C", complete=completion.settings),
    Flag("--profile", "generate", "Write a Chrome trace, show top ops.", Path, metavar="DIR"),
    Flag("--no-resume", "generate batch", "Start over, though a run of this command was cut short.", bool),
    Flag("--overwrite", "generate batch reproduce", "Replace files that show something else.", bool),
    Flag("--skip-bad", "batch", "Leave out rows that cannot be, and make the others.", bool),
    Flag("--dry-run", "generate batch", "Check everything, print the plan, make nothing.", bool),
    Flag("--check", "reproduce", "Compare only: write nothing.", bool),
    Flag("--json", "generate batch calibrate reproduce", "One JSON event a line on stdout.", bool),
    Flag("-q --quiet", "generate batch calibrate reproduce",
         "Tell nothing but errors, and the files that are made.", bool),
)
# fmt: on


@dataclass(frozen=True)
class Args:
    """What was typed for one command: `args["dry_run"]` is the value of `--dry-run`.

    A flag that was not typed has its row's default: False for a bool, else None where the row names none.

    Attributes:
        flags: the command's rows.
        values: by the rows' keys.
        origins: of the settings, once they are loaded.
    """

    flags: Sequence[Flag]
    values: Mapping[str, Any]
    origins: Origins = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def _typed(self) -> Iterator[tuple[Flag, Any]]:
        for flag in self.flags:
            value = self[flag.key]
            # False is a bool flag that was not typed; 0 is a value
            if value is not None and value is not False:
                yield flag, value

    def request_fields(self) -> dict[str, Any]:
        """The fields of `DiffusionUserParams` that were typed, by name."""
        fields: dict[str, Any] = {}
        for flag, value in self._typed():
            if flag.field:
                names = flag.field.split()
                fields |= zip(names, value if len(names) > 1 else [value], strict=True)
        return fields

    def settings(self, branch: str) -> dict[str, Any]:
        """The settings that were typed below a dotted name, by the rest of theirs."""
        typed = {name: value for flag, _ in self._typed() for name, value in self._settings(flag).items()}
        return {name.removeprefix(branch): value for name, value in typed.items() if name.startswith(branch)}

    def _settings(self, flag: Flag) -> dict[str, Any]:
        """The settings that a flag fills, by dotted name."""
        value = self[flag.key]
        return value if flag.setting == "*" else {flag.setting: value} if flag.setting else {}

    def load_config(self, recorded: Mapping[str, Any] | None = None) -> tuple[EngineConfig, Origins]:
        """Settings from all four places, and where each came from.

        Args:
            recorded: settings by dotted name that stand above file and environment, and below flags.

        Raises:
            UsageError: an unknown name or a bad value, naming the flag.
        """
        from chitu_diffusion.config import load_config

        settings: dict[str, Any] = dict(recorded or {})
        for flag, _ in self._typed():
            settings |= self._settings(flag)
        if self.values.get("no_resume"):
            settings["checkpoint.resume"] = "never"
        with self.named():
            config, origins = load_config(self.values.get("config"), settings)
        self.origins.update(origins)
        return config, origins

    @contextmanager
    def named(self) -> Iterator[None]:
        """An error about a field names the flag that was typed, or the file or variable of its value."""
        from chitu_diffusion.config import with_origin

        try:
            yield
        except (UsageError, ModelMissingError) as error:
            message = str(error)
            name = self._name_of(error.field or "")
            if name is None:
                raise with_origin(error, self.origins) from error.__cause__
            value = message.removeprefix(f"{error.field} = ")
            value = value.removeprefix(f"{str(error.field).rpartition('.')[2]} = ")
            text = f" {value}" if value != message else f": {message.removeprefix(f'{error.field}: ')}"
            raise type(error)(f"{name}{text}", field=error.field) from error

    def _name_of(self, name: str) -> str | None:
        """The flag that filled a field or a setting; None where none was typed."""
        found = "PROMPT" if name == "prompt" else None
        for flag, _ in self._typed():
            filled = [*flag.field.split(), *self._settings(flag)]
            if name in filled:  # the last one stands
                typed = flag.names.split()[0]
                found = f"{typed} {name}" if len(flag.field.split()) > 1 or flag.key == "set" else typed
        return found


def takes_flags(function: Callable[..., Result], flags: Sequence[Flag] = FLAGS) -> Callable[..., Result]:
    """A command for typer: in place of the parameter `args` stand the flags whose rows name the function.

    Args:
        function: takes `args: Args`, and whatever else typer understands.
        flags: the table.
    """
    own = [flag for flag in flags if function.__name__ in flag.commands.split()]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.name == "args":
            parameters += [flag.parameter() for flag in own]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def command(**typed: Any) -> Result:
        values = {flag.key: flag.parsed(typed.pop(flag.key)) for flag in own}
        if values.get("quiet"):
            be_quiet()
        return function(args=Args(own, values), **typed)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return command

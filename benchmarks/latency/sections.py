"""The sections of `benchmarks.latency`: what each times, on which network, and what it writes into the
report.

Knows variants and clocks; no command line. Each section stands alone, so that any can be left out, except
that the end-to-end and the profile take the fastest variant from the sections before them where these ran.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.latency.limits import Flops, ceilings, forward_flops
from benchmarks.latency.variants import (
    EIGHT_BIT_PEERS,
    EXACT_PEERS,
    OUR_GUESS,
    OURS_COMPILED,
    OURS_EIGHT_BIT,
    OURS_EXACT,
    PEERS_GUESS,
    UNTUNED_PEER,
    Absent,
    Builder,
    Variant,
    backend_of,
    chosen,
)
from benchmarks.measuring import (
    GIB,
    TERA,
    alternating,
    breakdown,
    kernel_spans,
    longest,
    peak_bytes,
    relative_error,
    timed_ms,
)
from benchmarks.networks import Case, Workload, case_of, filled, random_vae, small_case
from benchmarks.report import Report, first_line
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.evaluation.videos import make_video
from chitu_diffusion.flexcache.registry import parse_setting
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.folder import read_folder
from chitu_diffusion.models.loading import load_tokenizer
from chitu_diffusion.models.registry import ASSETS, TINY
from chitu_diffusion.models.wan.text_encoder import TextEncoder, build_text_encoder
from chitu_diffusion.models.wan.vae import WanVAE
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

PROMPT = "A cat walking on grass"
CACHED_STEPS = 12
FIXED_PLANS = ("interval:interval=2", "meancache:fresh=6", "blockdance", "pab")
UMT5_XXL: Mapping[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
"""Of the encoder that Wan's checkpoints hold (google/umt5-xxl)."""


class Latency:
    """What the sections share: networks with their variants, the machine's ceilings, how often to time.

    Args:
        device: where.
        small: networks that a CPU runs in a blink, to see that all of it works.
        rounds: timed calls of each variant.
        steps: of the end-to-end video.
        folder: for videos.
        without: names of variants to leave out.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        small: bool,
        rounds: int,
        steps: int,
        folder: Path,
        without: Iterable[str] = (),
    ) -> None:
        self.device = device
        self.small = small
        self.rounds = rounds
        self.steps = steps
        self.folder = folder
        self.without = frozenset(without)
        self.compiler = "inductor" if device.type == "cuda" else "eager"
        self.ceiling: dict[str, float] = {}
        self._workloads: dict[str, Workload] = {}
        self._variants: dict[tuple[str, str], Variant | None] = {}
        self.times: dict[tuple[str, str], float] = {}

    # -- networks

    def case(
        self, model: str, size: tuple[int, int, int] = (832, 480, 81), timed_layers: int | None = None
    ) -> Case:
        """The case of a name, or its stand-in for a small run."""
        if not self.small:
            return case_of(model, size, timed_layers)
        label = f"small {model.removeprefix('Wan2.1-T2V-')} {size[0]}x{size[1]}"
        return small_case(label, 6 if timed_layers else 3, 3)

    def workload(self, case: Case) -> Workload:
        """The case's network and inputs, made at the first asking; other networks are let go."""
        for name in [name for name, work in self._workloads.items() if work.case.spec != case.spec]:
            del self._workloads[name]
            self._variants = {key: variant for key, variant in self._variants.items() if key[0] != name}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if case.name not in self._workloads:
            self._workloads[case.name] = Workload(case, self.device, self.compiler)
        return self._workloads[case.name]

    def variant(self, work: Workload, name: str, builder: Builder, report: Report) -> Variant | None:
        """A variant, built at the first asking; None, with a note, where it is absent or fails."""
        key = work.case.name, name
        if key not in self._variants:
            self._variants[key] = None  # what failed once is not tried again
            try:
                if name in self.without:
                    raise Absent("left out by --without")
                self._variants[key] = builder(work)
            except Absent as error:
                report.note(f"{work.case.name}: {name} is absent: {first_line(error)}")
            except Exception as error:
                traceback.print_exc()
                report.note(f"{work.case.name}: {name} failed: {type(error).__name__}: {first_line(error)}")
        return self._variants[key]

    def fastest(self, case: Case, prefix: str, *, eight_bit: bool) -> str | None:
        """The fastest of a case's variants that were timed, by its name's beginning."""
        names = [
            name
            for at, name in self.times
            if at == case.name and name.startswith(prefix) and ("fp8" in name) == eight_bit
        ]
        return min(names, key=lambda name: self.times[case.name, name], default=None)

    # -- forwards

    def forwards(
        self,
        report: Report,
        case: Case,
        part: str,
        builders: Mapping[str, Builder],
        rounds: int | None = None,
    ) -> None:
        """A table of one forward in each of these ways, timed in turn.

        Args:
            report: gets the table.
            case: network and size.
            part: of the case, for the table's heading: one table is one taking of turns.
            builders: the ways, by name; the first is what the others' velocities are compared with.
            rounds: timed calls of each; None is the command line's.
        """
        work = self.workload(case)
        ready: dict[str, Variant] = {}
        for name, builder in builders.items():
            if name == f"ours_{auto_kernel(ready)}":
                continue  # "auto" is this one
            variant = self.variant(work, name, builder, report)
            if variant is not None:
                ready[name] = variant
        found = alternating(
            {name: each.call for name, each in ready.items()}, rounds or self.rounds, self.device
        )
        each_ms = {name: [ms / ready[name].forwards for ms in timing.ms] for name, timing in found.items()}
        times = {name: float(median(ms)) for name, ms in each_ms.items()}
        self.times |= {(case.name, name): ms for name, ms in times.items()}
        bare = self.bare_ms(work) if case.layers != case.config.num_layers else 0.0
        compared = ratios(times)
        for name, variant in ready.items():
            row = self.row(case, name, variant, each_ms[name], bare)
            row["work_gib"] = found[name].allocated / GIB
            row["error_to_first"] = relative_error(variant.velocity, next(iter(ready.values())).velocity)
            report.add(f"Forward, {case.name}: {part}", {**row, **compared.get(name, {})})

    def row(self, case: Case, name: str, variant: Variant, ms: list[float], bare: float) -> dict[str, Any]:
        """One variant's figures."""
        flops = forward_flops(case.config, case.tokens, case.spec.text_tokens)
        middle = float(median(ms))
        row: dict[str, Any] = {
            "variant": name,
            "layers": case.config.num_layers,
            "ms": middle,
            "min": min(ms),
            "max": max(ms),
        }
        if case.layers != case.config.num_layers:
            row[f"ms_{case.layers}_layers_from_{case.config.num_layers}"] = carried_over(middle, bare, case)
        if variant.backend is not None:
            row["attention"] = variant.backend.attn_backend.name
        row |= rates(flops, middle, self.ceiling)
        row |= {"warm_up_s": variant.warm_up, "weights_gib": variant.weights / GIB}
        return row

    def bare_ms(self, work: Workload) -> float:
        """A forward without its blocks: embedding, head and unpatchify."""
        network = work.network()

        @torch.no_grad()
        def call() -> None:
            embedded = network.embed(work.latent, work.text[:1], work.timestep)
            network.unpatchify(network.final_layer(embedded.tokens, embedded.time), embedded.grid)

        return min(timed_ms(call, self.device) for _ in range(4))

    # -- the sections

    def ceilings(self, report: Report) -> None:
        """What a large product and a large copy reach."""
        self.ceiling = ceilings(self.device)
        report.add("Ceilings", self.ceiling)

    def small_exact(self, report: Report) -> None:
        """1.3B in 16 bits."""
        # there the other compiled ones are absent
        plain = [] if self.device.type == "cuda" else ["diffusers_compiled"]
        self.forwards(
            report, self.case("Wan2.1-T2V-1.3B"), "16 bits", chosen([*EXACT_PEERS, *plain, *OURS_EXACT])
        )

    def small_compiled(self, report: Report) -> None:
        """1.3B in 16 bits, our blocks compiled: beside, and in place of, the fused kernels."""
        names = ["diffusers_compiled_fa3", "ours_auto", *OURS_COMPILED]
        self.forwards(report, self.case("Wan2.1-T2V-1.3B"), "16 bits, compiled", chosen(names), 2)

    def small_eight_bit(self, report: Report) -> None:
        """1.3B in 8 bits."""
        self.forwards(report, self.case("Wan2.1-T2V-1.3B"), "8 bits", {**EIGHT_BIT_PEERS, **OURS_EIGHT_BIT})

    def large_exact(self, report: Report) -> None:
        """14B in 16 bits, on 8 layers: the best peer, what `auto` chooses, and what was fastest at 1.3B."""
        names = [
            "diffusers_compiled_fa3",
            "ours_auto",
            self.fastest(self.case("Wan2.1-T2V-1.3B"), "ours_", eight_bit=False),
        ]
        self.forwards(report, self.case("Wan2.1-T2V-14B", timed_layers=8), "16 bits", chosen(names))

    def large_eight_bit(self, report: Report) -> None:
        """14B in 8 bits, on 8 layers: none of them kept in 16, for of 8 layers these would be a quarter, of
        40 a twentieth.
        """
        small = self.case("Wan2.1-T2V-1.3B")
        timed = [name for at, name in self.times if at == small.name and name.startswith("ours_fp8_all")]
        fastest = min(timed, key=lambda name: self.times[small.name, name], default=OUR_GUESS[True])
        names = ["diffusers_compiled_fa3", *UNTUNED_PEER, fastest]
        self.forwards(report, self.case("Wan2.1-T2V-14B", timed_layers=8), "8 bits", chosen(names))

    def large_720p(self, report: Report) -> None:
        """14B at 1280x720, on 8 layers, in the ways that were fastest at 832x480."""
        case = self.case("Wan2.1-T2V-14B", (1280, 720, 81), timed_layers=8)
        self.forwards(
            report,
            case,
            "ours",
            chosen([self.best_of_14b(eight_bit=eight) for eight in (False, True)]),
            rounds=2,
        )

    def large_40(self, report: Report) -> None:
        """14B with all of its layers, ours alone: fastest exact, 8 bits by the settings' defaults."""
        names = [self.best_of_14b(eight_bit=False), "ours_fp8"]
        self.forwards(report, self.case("Wan2.1-T2V-14B"), "ours", chosen(names), rounds=1)

    def best_of_14b(self, *, eight_bit: bool) -> str:
        """Our fastest variant of 14B on 8 layers; where none was timed, a guess."""
        case = self.case("Wan2.1-T2V-14B", timed_layers=8)
        return self.fastest(case, "ours_", eight_bit=eight_bit) or OUR_GUESS[eight_bit]

    def end_to_end(self, report: Report) -> None:
        """A video of 1.3B from prompt to file, by our generator, with an encoder and a VAE of full size and
        random weights.
        """
        case = self.case("Wan2.1-T2V-1.3B")
        work = self.workload(case)
        name = self.fastest(case, "ours_", eight_bit=False)
        kept = self._variants.get((case.name, name)) if name is not None else None
        settings = dict((kept.settings if kept is not None else None) or {"attn_type": "auto"})
        backend = backend_of(work, settings, *random_ends(self.device, work.dtype, self.small))
        # prompts are encoded once, so another
        warm_up = self.video(backend, case, 1, "A red fish swims left in the sea")
        whole: dict[str, float] = {}
        peak = peak_bytes(lambda: whole.update(self.video(backend, case, self.steps)), self.device)
        row: dict[str, Any] = {
            "variant": name or "ours",
            "steps": self.steps,
            "seconds": sum(whole.values()),
            **whole,
        }
        forward_ms = self.times.get((case.name, name or ""))
        if forward_ms is not None:
            loop = whole[f"{TaskStatus.DENOISING}_s"]
            row["loop_share_beyond_forwards"] = 1 - 2 * self.steps * forward_ms / 1e3 / loop
        row |= {"warm_up_s": sum(warm_up.values()), "work_gib": peak / GIB}
        report.add("End to end, prompt to file", row)
        self.idle(report, backend, case)
        backend.terminate()

    def video(
        self, backend: DiffusionBackend, case: Case, steps: int, prompt: str = PROMPT
    ) -> dict[str, float]:
        """Seconds of each stage of one video."""
        path = str(self.folder / f"latency-{steps}.npy")
        params = DiffusionUserParams(
            prompt,
            seed=1,
            height=case.height,
            width=case.width,
            num_frames=case.frames,
            num_inference_steps=steps,
            save_path=path,
        )
        task = DiffusionTask.from_user_request(params)
        generator = Generator(backend)
        while not task.is_finished():
            generator.generate_step(task)
        if task.error is not None:
            raise task.error
        Path(path).unlink(missing_ok=True)
        return {f"{stage}_s": seconds for stage, seconds in task.seconds.items()}

    def idle(self, report: Report, backend: DiffusionBackend, case: Case, steps: int = 3) -> None:
        """Share of the denoising loop in which no kernel runs, by the profiler, over a few steps."""
        generator = Generator(backend)
        embeddings = generator.encode_text([PROMPT, "blurry"])
        noise = torch.randn(case.latent_shape)
        # a text of another length may want a kernel of its own, compiled once
        generator.denoise_loop(noise, embeddings, 1, 5.0)
        spans = kernel_spans(lambda: generator.denoise_loop(noise, embeddings, steps, 5.0), self.device)
        found = breakdown(spans)
        row = {"variant": f"loop of {steps} steps", "idle_share": idle_share(found), **found}
        report.add("Where the time goes, ms", row)

    def cached(self, report: Report) -> None:
        """Fixed plans at 1.3B: the denoising seconds that each saved, over what the forwards that it skipped
        had cost.

        Weights are random, so that nothing is said of the picture.
        """
        case = self.case("Wan2.1-T2V-1.3B")
        work = self.workload(case)
        ends = random_ends(self.device, work.dtype, self.small)
        backend = backend_of(work, {"attn_type": "auto"}, *ends)
        size = {"height": case.height, "width": case.width, "num_frames": case.frames}
        steps = CACHED_STEPS
        make_video(backend, prompt=PROMPT, seed=1, num_inference_steps=2, **size)  # chooses kernels
        full = make_video(backend, prompt=PROMPT, seed=1, num_inference_steps=steps, **size)
        for setting in FIXED_PLANS:
            cache = parse_setting(setting)
            made = make_video(
                backend, prompt=PROMPT, seed=1, num_inference_steps=steps, flexcache=cache, **size
            )
            saved = 1 - made.work / full.work
            kept = (full.seconds - made.seconds) / (saved * full.forward_seconds) if saved > 0 else None
            row = {
                "setting": setting,
                "steps": steps,
                "forwards_saved": saved,
                "seconds": made.seconds,
                "full_s": full.seconds,
            }
            report.add(
                "Step caches", {**row, "faster": full.seconds / made.seconds, "saved_of_skipped": kept}
            )
        backend.terminate()

    def on_a_cpu(self, report: Report) -> None:
        """wan-tiny from prompt to frames, beside diffusers' pipeline."""
        from benchmarks.latency.cpu import beside_pipeline

        beside_pipeline(report, self.rounds, small=self.small)

    def profile(self, report: Report) -> None:
        """Kernels by kind at 1.3B for our fastest exact and 8-bit variants and the fastest peers, or a guess
        at these.
        """
        case = self.case("Wan2.1-T2V-1.3B")
        work = self.workload(case)
        sides = (("diffusers_", PEERS_GUESS), ("ours_", OUR_GUESS))
        names = [
            self.fastest(case, prefix, eight_bit=eight) or guess[eight]
            for prefix, guess in sides
            for eight in (False, True)
        ]
        for name, builder in chosen(names).items():
            variant = self.variant(work, name, builder, report)
            if variant is None:
                continue
            spans = kernel_spans(variant.call, self.device)
            found = {kind: ms / variant.forwards for kind, ms in breakdown(spans).items()}
            report.add("Where the time goes, ms", {"variant": name, "idle_share": idle_share(found), **found})
            for kernel in longest(spans, 30):
                report.add(f"Longest kernels, {name}", kernel)


def auto_kernel(ready: Mapping[str, Variant]) -> str | None:
    """The attention that `ours_auto` chose, if it is among the variants."""
    backend = ready["ours_auto"].backend if "ours_auto" in ready else None
    return None if backend is None else backend.attn_backend.name


def carried_over(ms: float, bare: float, case: Case) -> float:
    """Milliseconds with all layers from those with some: what the blocks take grows with their number, the
    rest does not.

    It flatters ours, whose branches share the first self-attention: of 8 layers that is a sixteenth of the
    attention, of 40 an eightieth, some 3 % of the whole. All 40 layers, measured by `benchmarks.scaling`,
    took 2,504 ms where this says 2,403.
    """
    return (ms - bare) * case.layers / case.config.num_layers + bare


def rates(flops: Flops, ms: float, ceiling: Mapping[str, float]) -> dict[str, float]:
    """Achieved TFLOP/s, and its share of this run's large 16-bit product."""
    reached = flops.total / (ms / 1e3) / TERA
    found = {"tflops": reached}
    if "bf16_tflops" in ceiling:
        found["share_of_bf16_product"] = reached / ceiling["bf16_tflops"]
    return found


def idle_share(found: Mapping[str, float]) -> float:
    """Of the span of a breakdown, the part in which no kernel runs."""
    return found["gaps"] / found["span"] if found["span"] > 0 else 0.0


def random_ends(
    device: torch.device, dtype: torch.dtype, small: bool
) -> tuple[TextEncoder, WanVAE] | tuple[()]:
    """An encoder of UMT5-XXL's size with wan-tiny's tokenizer, and Wan's VAE, with random weights; nothing
    for a small run.
    """
    if small:
        return ()
    folder = read_folder(ASSETS / TINY)
    encoder: Any = filled(build_text_encoder(UMT5_XXL), device, dtype)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight  # one table, as in the checkpoint
    return TextEncoder(encoder, load_tokenizer(folder.tokenizer)), random_vae({}, device, dtype)


def ratios(times: Mapping[str, float], peer: str = "diffusers") -> dict[str, dict[str, float]]:
    """How many times faster each entry is than each of the peer's: {name: {"ratio_vs_diffusers_eager": 1.3,
    ...}}.

    Args:
        times: name -> time, the peer's entries being called "PEER_VARIANT"; they get no ratios of their own.
        peer: the prefix.
    """
    theirs = {
        name.removeprefix(f"{peer}_"): value for name, value in times.items() if name.startswith(f"{peer}_")
    }
    ours = {name: value for name, value in times.items() if not name.startswith(f"{peer}_")}
    return {
        name: {f"ratio_vs_{peer}_{variant}": other / value for variant, other in theirs.items()}
        for name, value in ours.items()
    }

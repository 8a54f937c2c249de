"""The benchmarks' own arithmetic and book-keeping: work by shapes, ratios, tables, budget, kinds of kernels,
the bridge.
"""

import json
import random
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fidelity, latency, overlap, peers, scaling, simulate_scaling
from benchmarks.measuring import Span, alternating, breakdown, forward_work, kernel_spans, kind_of, longest
from benchmarks.report import Report, Section, file_name, plain, ratios, run_sections, table_of
from benchmarks.sections import Latency, carried_over, chosen, relative_error
from benchmarks.variants import Bench, Variant, case_of, diffusers, ours, random_weights, small_case
from chitu_diffusion.models.wan.config import WanConfig

CPU = torch.device("cpu")


# -- work


def test_work_is_what_torch_counts():
    """Every shape drawn anew; the formula must agree with torch's counter on diffusers' network to the last
    operation.

    Attention as plain products: torch's counter does not know the CPU's flash kernel.
    """
    draw = random.Random()
    config = WanConfig(
        num_attention_heads=draw.randint(1, 3),
        attention_head_dim=16 * draw.randint(1, 2),
        ffn_dim=draw.randint(20, 90),
        freq_dim=32,
        text_dim=draw.randint(8, 40),
        num_layers=draw.randint(1, 3),
    )
    frames, rows, columns, texts = (
        draw.randint(1, 3),
        2 * draw.randint(1, 4),
        2 * draw.randint(1, 4),
        draw.randint(1, 9),
    )
    network = peers.twin(config, random_weights(config, CPU, torch.float32), CPU)
    latent, text = torch.randn(1, 16, frames, rows, columns), torch.randn(1, texts, config.text_dim)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        peers.one_forward(network, latent, torch.tensor([3.0]), text)()
    assert counter.get_total_flops() == forward_work(config, frames * rows * columns // 4, texts).total, (
        config
    )


@pytest.mark.parametrize(
    ("model", "size", "tera"),
    [
        ("Wan2.1-T2V-1.3B", (832, 480, 81), 283),
        ("Wan2.1-T2V-14B", (832, 480, 81), 1678),
        ("Wan2.1-T2V-14B", (1280, 720, 81), 6523),
    ],
)
def test_work_of_the_full_models(model, size, tera):
    """The published totals, which leave out embeddings and head: less than one percent more."""
    case = case_of(model, size)
    assert tera <= forward_work(case.config, case.tokens).total / 1e12 <= tera * 1.01


def test_time_of_all_layers_from_some():
    """Exact where time is so much a layer and so much besides."""
    case = case_of("Wan2.1-T2V-14B", (832, 480, 81), 8)
    assert case.config.num_layers == 8 and case.layers == 40 and "8 of 40 layers" in case.name
    assert carried_over(5 + 8 * 61.5, 5, case) == pytest.approx(5 + 40 * 61.5)


# -- tables


def test_ratios_are_named_after_the_peer():
    found = ratios({"diffusers_eager": 6.0, "diffusers_compiled_fa3": 4.5, "ours_auto": 3.0, "ours_fa3": 1.5})
    assert found == {
        "ours_auto": {"ratio_vs_diffusers_eager": 2.0, "ratio_vs_diffusers_compiled_fa3": 1.5},
        "ours_fa3": {"ratio_vs_diffusers_eager": 4.0, "ratio_vs_diffusers_compiled_fa3": 3.0},
    }


def test_table_has_a_column_for_every_key():
    rows = [{"variant": "a|b", "ms": 462.41, "fits": True}, {"variant": "c", "ms": 2490.0, "ratio": 1.06}]
    assert table_of(rows).splitlines() == [
        "| variant | ms | fits | ratio |",
        "|---|---:|---:|---:|",
        "| a/b | 462.4 | yes |  |",
        "| c | 2490 |  | 1.06 |",
    ]


def test_report_is_rewritten_whole(tmp_path):
    report = report_in(tmp_path)
    report.add("Forward", {"variant": "ours", "ms": 1.5})
    report.write()
    report.add("Forward", {"variant": "theirs", "ms": float("inf")})
    report.note("one was absent")
    written, told = report.write()
    found = json.loads(written.read_text())
    assert found["tables"]["Forward"] == [{"variant": "ours", "ms": 1.5}, {"variant": "theirs", "ms": "inf"}]
    assert found["facts"] == {"device": "cpu"} and found["notes"] == ["one was absent"]
    assert "| theirs | inf |" in told.read_text() and "* one was absent" in told.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]


def test_results_are_plain_json():
    assert plain({"a": (1, float("nan"), CPU)}) == {"a": [1, "nan", "cpu"]}
    assert file_name("latency", "NVIDIA H200 (x)", date(2026, 1, 2)) == "2026-01-02-latency-nvidia-h200-x"


# -- budget


def report_in(folder):
    return Report("T", {"device": "cpu"}, folder, "x")


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def section(self, name: str, estimate: float, real: float | None = None) -> Section:
        def run(report: Report) -> None:
            self.now += estimate if real is None else real
            if real is not None and real < 0:
                raise RuntimeError("no such kernel\nand more")
            report.add("Done", {"section": name})

        return Section(name, "", estimate, run)


def outcomes(report: Report) -> dict[str, str]:
    return {name: facts["outcome"] for name, facts in report.sections.items()}


def test_sections_that_do_not_fit_are_left_out(tmp_path):
    """10 of 30 s, then a 25 s one that cannot, then 15 s that can, then nothing more."""
    clock, report = Clock(), report_in(tmp_path)
    run_sections(
        [clock.section(*row) for row in (("a", 10), ("b", 25), ("c", 15), ("d", 6))],
        report,
        budget=30,
        clock=clock,
    )
    assert outcomes(report) == {"a": "done", "b": "skipped", "c": "done", "d": "skipped"}
    assert report.tables["Done"] == [{"section": "a"}, {"section": "c"}]
    assert "b was left out: about 25 s, and 20 s are left" in report.notes[0]


def test_real_time_counts_not_the_estimate(tmp_path):
    clock, report = Clock(), report_in(tmp_path)
    run_sections(
        [clock.section("a", 10, 29), clock.section("b", 2)], report, budget=30, clock=clock, began=clock.now
    )
    assert outcomes(report) == {"a": "done", "b": "skipped"}


def test_a_section_that_fails_does_not_stop_the_next(tmp_path, capsys):
    clock, report = Clock(), report_in(tmp_path)
    run_sections([clock.section("a", 0, -1), clock.section("b", 2)], report, clock=clock)
    assert outcomes(report) == {"a": "failed", "b": "done"}
    assert report.notes == ["a failed: RuntimeError: no such kernel"]
    assert "Traceback" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["sections"]["a"]["outcome"] == "failed"


def test_sections_by_name(tmp_path):
    clock, report = Clock(), report_in(tmp_path)
    sections = [clock.section("a", 1), clock.section("b", 2)]
    run_sections(sections, report, asked=["b"], clock=clock)
    assert outcomes(report) == {"b": "done"}
    with pytest.raises(ValueError, match="no section c; there are: a, b"):
        run_sections(sections, report, asked=["c"], clock=clock)


# -- where the time goes


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>",
            "attention",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x64", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", "gemm"),
        (
            "void "
            "cutlass::device_kernel<enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<...>>>",
            "gemm",
        ),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_tilesize256x32x32", "convolution"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_red_fused__to_copy_add_mul_native_layer_norm_0", "element-wise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::BFloat16...>", "element-wise"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>", "copy"),
    ],
)
def test_kernels_by_kind(kernel, kind):
    assert kind_of(kernel) == kind


def test_gaps_are_where_nothing_runs():
    """Overlapping kernels count once as busy, twice in their kinds; microseconds in, milliseconds out."""
    spans = [Span("nvjet", 3000, 5000), Span("flash", 1000, 2000), Span("memcpy", 1500, 2500)]
    found = breakdown(spans)
    assert {name: ms for name, ms in found.items() if ms} == {
        "attention": 1.0,
        "gemm": 2.0,
        "copy": 1.0,
        "busy": 3.5,
        "span": 4.0,
        "gaps": 0.5,
    }
    assert breakdown([])["span"] == 0
    assert longest([*spans, Span("flash", 6000, 7500)], 1) == [
        {"kernel": "flash", "kind": "attention", "calls": 2, "ms": 2.5}
    ]


def test_profiler_sees_the_operators():
    a = torch.randn(64, 64)
    kinds = {kind_of(span.name) for span in kernel_spans(lambda: (a @ a).exp(), CPU)}
    assert {"gemm", "element-wise"} <= kinds


def test_variants_take_turns():
    order = []
    found = alternating({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert "".join(order) == "abbaab" and [len(timing.ms) for timing in found.values()] == [3, 3]


# -- variants


@pytest.fixture(scope="module")
def both() -> tuple[Variant, Variant]:
    bench = Bench(small_case("small", 2, 2), CPU, "eager")
    return ours(attn_type="sdpa")(bench), diffusers()(bench)


def test_ours_and_the_peer_run_the_same_network(both):
    """The same weights, so the same velocity; 1e-5 is float32 rounding through two layers."""
    assert relative_error(both[0].velocity, both[1].velocity) < 1e-5
    assert both[0].velocity.abs().mean() > 0.01
    assert both[0].forwards == 2 and both[1].forwards == 1


def test_random_weights_are_loaded_as_a_checkpoint_is():
    """Kept in float32 where diffusers keeps it, the rest in the dtype asked for; sizes within
    reason.
    """
    config = small_case("small", 1, 1).config
    weights = random_weights(config, CPU, torch.bfloat16)
    twin = peers.twin(config, weights, CPU)
    assert twin.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert twin.blocks[0].norm2.weight.dtype == twin.scale_shift_table.dtype == torch.float32
    assert twin.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert twin.blocks[0].attn1.to_q.weight.data_ptr() == weights["blocks.0.attn1.to_q.weight"].data_ptr()
    assert 0.5 < float(weights["blocks.0.ffn.net.0.proj.weight"].float().std()) * config.dim**0.5 < 1.5


_FAKE = """
import torch
library = torch.library.Library("fa3_fwd", "DEF")
arguments = "Tensor q, Tensor k, Tensor? v=None, Tensor(out!)? out=None, float? scale=None"
library.define(f"fwd({arguments}) -> (Tensor(out!), Tensor)")
library.impl("fwd", lambda q, k, v=None, out=None, scale=None: (q + k, k), "CPU")
def flash_attn_func(*values): return "attended"
def flash_attn_varlen_func(*values): return "attended"
"""
_ASK = """
import sys, torch
from benchmarks.peers import offer_flash_attention_3
assert offer_flash_attention_3() is None
from diffusers.models import attention_dispatch as diffusers
assert diffusers._CAN_USE_FLASH_ATTN_3
diffusers._check_attention_backend_requirements(diffusers.AttentionBackendName("_flash_3"))
assert diffusers.flash_attn_3_func(1, 2, 3) == "attended"
from torch.nn.attention import _fa3
_fa3._fa3_import_module("flash_attn_interface")
ours, theirs = (str(library.fwd.default._schema) for library in (torch.ops.flash_attn_3, torch.ops.fa3_fwd))
assert ours.removeprefix("flash_attn_3") == theirs.removeprefix("fa3_fwd"), (ours, theirs)
print("offered")
"""


def test_diffusers_and_torch_find_the_bridge(tmp_path):
    """Both ask as they would ask an installation; the wheel is stood in for by a module with its names."""
    (tmp_path / "fa3_fwd_interface.py").write_text(_FAKE)
    found = subprocess.run(
        [sys.executable, "-c", _ASK],
        env={"PYTHONPATH": f"{tmp_path}:.", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout.strip() == "offered", found.stderr


def test_the_fastest_by_kind():
    """8-bit variants have fp8 in their names; peers and ours are asked for apart, and another case's times do
    not count.
    """
    found = Latency(CPU, small=True, rounds=1, steps=1, folder=Path())
    case, other = small_case("a", 2, 2), small_case("b", 2, 2)
    found.times = {(case.name, "ours_auto"): 3.0, (case.name, "ours_fa3"): 2.0, (case.name, "ours_fp8"): 1.0}
    found.times |= {(other.name, "ours_cudnn"): 0.1, (case.name, "diffusers_eager"): 0.5}
    assert found.fastest(case, "ours_", eight_bit=False) == "ours_fa3"
    assert found.fastest(case, "ours_", eight_bit=True) == "ours_fp8"
    assert found.fastest(case, "diffusers_", eight_bit=True) is None
    assert set(chosen(["ours_fa3", None, "ours_fa3", "diffusers_eager"])) == {"ours_fa3", "diffusers_eager"}


# -- the commands


def test_latency_writes_its_results(tmp_path):
    """A small run of three sections: ours beside diffusers, ratios in the table, files where they were asked
    for.
    """
    words = [
        "--small",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
        "--sections",
        "ceilings",
        "small-exact",
    ]
    report = latency.main(words)
    (rows,) = (rows for name, rows in report.tables.items() if name.startswith("Forward"))
    by_name = {row["variant"]: row for row in rows}
    assert (
        by_name["ours_auto"]["ratio_vs_diffusers_eager"]
        == by_name["diffusers_eager"]["ms"] / by_name["ours_auto"]["ms"]
    )
    assert by_name["ours_auto"]["error_to_first"] < 1e-5 and by_name["ours_auto"]["share_of_bf16_product"] > 0
    assert set(outcomes(report).values()) == {"done"}
    assert len(list(tmp_path.glob("*-latency-small-cpu.*"))) == 2


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (
            latency.main,
            ["--without", "ours_cudn"],
            "--without ours_cudn: no such variant; there are: .*ours_cudnn",
        ),
        (fidelity.main, ["--ways", "fa4"], "--ways fa4: in no way's name; there are: .*fa3_fp8 attention"),
        (simulate_scaling.main, ["none.json"], "none.json: .*python -m benchmarks.scaling"),
        (overlap.main, [], "torchrun --nproc-per-node 2 -m benchmarks.overlap"),
        (scaling.main, ["--layouts", "u2,u2@x"], "'u2@x': use u2@nccl, or u2@8"),
        (scaling.main, ["--layouts", "u2,ux"], "'ux': .*'auto', or parts such as"),
    ],
)
def test_wrong_words_are_told_before_any_work(main, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert re.search(said, f"{ended.value} {capsys.readouterr().err}")


def test_fidelity_tells_precisions_apart(tmp_path):
    """Three steps of a small video: another float32 kernel differs by rounding, 16 bits by some 1e-2 and
    still a video.
    """
    found, report = fidelity.Fidelity("cpu", 1, small=True), report_in(tmp_path)
    for name in (fidelity.REFERENCE, "float32 sdpa, fused", "bfloat16 sdpa", "bfloat16 math, fused"):
        found.way(name, report)
    found.noise_floor(report)
    reference, single, half, _, floor = report.tables["Fidelity"]
    assert not report.notes and reference["way"] == next(iter(fidelity.WAYS))
    assert single["forward_error_max"] < 1e-4 < 1e-3 < half["forward_error_mean"] < 0.1
    assert half["psnr_db_min"] > 15 and single["psnr_db_min"] > half["psnr_db_min"] + 20
    assert floor["kind"] == "noise floor" and 15 < floor["psnr_db_mean"] < 60
    assert 0 <= half["adherence_low"] <= half["adherence"] <= half["adherence_high"] <= 1


def test_a_way_that_is_not_there_is_noted(tmp_path):
    found, report = fidelity.Fidelity("cpu", 1, small=True), report_in(tmp_path)
    found.way("sage attention", report)
    assert "Fidelity" not in report.tables and report.notes[0].startswith(
        "sage attention is absent: attn_type = 'sage'"
    )

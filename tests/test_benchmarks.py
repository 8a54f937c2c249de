"""Every benchmark's command on a CPU, small; what they count; and that bad words are told before the work."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    faults,
    fidelity,
    gpu_check,
    kernels,
    lora,
    packed,
    reliability,
    report,
    resume_check,
    service,
    simulate_scaling,
    vae,
    vae_encode,
)
from benchmarks.latency import __main__ as latency
from benchmarks.latency import peers
from benchmarks.latency.limits import forward_flops
from benchmarks.measuring import Span, breakdown, kind_of
from benchmarks.networks import case_of, random_transformer
from benchmarks.report import RESULTS, Report, Section, run_sections
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.pieces import hidden_share
from chitu_diffusion.distributed.plan import parse_layout, plan_for
from chitu_diffusion.models.wan.config import WanConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = ["--small", "--device", "cpu"]


def untracked() -> set[str]:
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines())


@pytest.fixture(autouse=True)
def nothing_left_in_the_checkout() -> Iterator[None]:
    before = untracked()
    yield
    assert untracked() <= before


KEEP_RESULTS = [  # those that take a folder, with the words that they need besides
    (latency.main, []),
    (kernels.main, ["--small"]),
    (vae.main, []),
    (vae_encode.main, []),
    (fidelity.main, []),
    (scaling.main, []),
    (faults.main, []),
    (service.main, []),
    (simulate_scaling.main, ["x.json"]),
]
PRINT_ONLY = [gpu_check.main, lora.main, packed.main, reliability.main, resume_check.main]


def test_what_an_adapter_costs_is_measured(capsys) -> None:
    assert lora.main([*SMALL, "--rank", "4"]) == 0
    said = capsys.readouterr().out
    assert "a guided step with it" in said and "take it out" in said


def test_what_packed_weights_cost_is_measured(capsys) -> None:
    packed.main(SMALL)  # its time means nothing here
    said = capsys.readouterr().out
    assert (
        "GiB" in said
        and "| a guided step, packed" in said
        and "| velocities that differ |  |  |  | 0 |" in said
    )


SMALL_RUNS = [  # command, flags, table, one of its columns, and what that may be at least and at most
    (latency.main, "--sections,ceilings,small-exact,cpu,--rounds,1", "Forward", "error_to_first", 0, 1e-5),
    (
        kernels.main,
        "--sections,errors,around,plain,fused,compiled,auto",
        "Forward",
        "relative_error",
        0,
        1e-5,
    ),
    (kernels.main, "--sections,products,fused fp8", "Forward", "relative_error", 1e-4, 0.1),
    (vae.main, "--sections,float32,diffusers,ours,convolutions", "Decode", "psnr_db", 100, 200),
    (vae_encode.main, "--sections,Wan2.1", "Encode", "relative_error", 0, 1e-5),
    (service.main, "--sections,overhead,readers,flood,growth", "Readers", "all_in_order", 1, 1),
    (fidelity.main, "--ways,float32", "Fidelity", "forward_error_max", 1e-8, 1e-4),
]


@pytest.mark.parametrize(("main", "flags", "table", "column", "least", "most"), SMALL_RUNS)
def test_a_small_run(main, flags, table, column, least, most, tmp_path: Path) -> None:
    report = main([*SMALL, *flags.split(","), "--out", str(tmp_path / "new")])
    (rows,) = (rows for name, rows in report.tables.items() if name.startswith(table))
    found = [row[column] for row in rows if column in row]
    assert not report.failed and found and least <= min(found) <= max(found) <= most, report.markdown()
    written, told = sorted((tmp_path / "new").iterdir())
    assert {"date", "commit", "command", "device", "torch"} <= set(json.loads(written.read_text())["facts"])
    assert f"## {table}" in told.read_text()


def test_gpu_kernels_are_their_twins() -> None:
    """The table of `gpu_check`, in Triton's interpreter."""
    found = gpu_check.checks(16, 2, CPU, torch.float32)
    rows = [gpu_check.checked(name, *check, CPU) for name, check in found.items()]
    assert len(rows) == 18 and {row["verdict"] for row in rows} == {"ok"}, rows
    wrong = gpu_check.checked("x", lambda ours: torch.ones(3) * (1.1 if ours else 1), 1e-3, CPU)
    assert wrong["verdict"] == "WRONG"


def scale(rank: int, world: int, store: dist.TCPStore, out: str, *words: str) -> None:
    """The command in a process that looks like one of torchrun's; its exit code goes to a file."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in {**place, "MASTER_PORT": store.port}.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    Path(out, f"{rank}.code").write_text(str(scaling.main([*SMALL, "--repeats", "1", "--out", out, *words])))


def test_scaling_and_its_simulation(tmp_path: Path) -> None:
    """A section fails on both ranks or on none and the run goes on; what is sent is what the formula says."""
    words = ["--only", "links,u2,r2,u64,overlap,kernels,fault", "--layouts", "u2,r2,u64"]
    run_ranks(2, scale, str(tmp_path), *words, errors=tmp_path, seconds=100)
    (file,) = tmp_path.glob("*-scaling-small-cpu-x2.json")
    results = json.loads(file.read_text())
    assert [(tmp_path / f"{rank}.code").read_text() for rank in (0, 1)] == ["1", "1"]
    assert [name for name, found in results.items() if "failed" in found] == ["wan-tiny small u64"]
    assert set(results["wan-tiny small u64"]["failed"]) == {"0", "1"}
    axes = {"ulysses": "ulysses", "ring": "ring", "sequence": "gather", "branches": "guidance"}
    for found in (results["wan-tiny small u2"], results["wan-tiny small r2"]):
        formula = found["formula_numbers"]
        assert found["bytes_sent"] == {axis: 4 * formula[name] for axis, name in axes.items()}
    assert results["fault"]["groups_again"] and all(each["raised"] for each in results["fault"]["ranks"])
    simulate_scaling.main([str(file), "--out", str(tmp_path / "simulated")])
    every = simulate_scaling.plans(8, 12)
    assert [plan_for(8, 12, **parse_layout(scaling.str_of(plan))) for plan in every] == every
    study = json.loads((tmp_path / "simulated" / f"{file.stem}-simulated.json").read_text())
    assert {check["case"] for check in study["checks"]} == {"wan-tiny small u2", "wan-tiny small r2"}


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (latency.main, ["--without", "ours_cudn"], "no such variant; there are: .*ours_cudnn"),
        (latency.main, ["--sections", "smal"], "no section smal; there are: .*small-exact"),
        (fidelity.main, ["--ways", "fa4"], "in no way's name; there are: .*fa3_fp8 attention"),
        (simulate_scaling.main, ["none.json"], "none.json: .*python -m benchmarks.scaling"),
        (scaling.main, ["--layouts", "u2,u2@x"], "'u2@x': use u2@nccl, or u2@8"),
        (scaling.main, ["--layouts", "u2,ux"], "'ux': .*'auto', or parts such as"),
        *(
            (
                main,
                [*words, "--out", f"{__file__}/results"],
                "--out: .*/results: Not a directory; use another folder",
            )
            for main, words in KEEP_RESULTS
        ),
    ],
)
def test_wrong_words_are_told_before_any_work(main, words, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert re.search(said, f"{ended.value} {capsys.readouterr().err}")


def test_every_benchmark_is_tried_here() -> None:
    folder = ROOT / "benchmarks"
    commands = {
        str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for file in folder.rglob("*.py")
        if '__name__ == "__main__"' in file.read_text()
    }
    assert {main.__module__ for main in [*PRINT_ONLY, *(main for main, _ in KEEP_RESULTS)]} == commands


def test_a_small_run_keeps_nothing_unless_asked(tmp_path: Path, monkeypatch, capsys) -> None:
    """Whatever the benchmark: where its results go is asked of one function."""
    kept = tmp_path / "kept"
    monkeypatch.setattr(report, "RESULTS", kept)
    found = vae.main([*SMALL, "--sections", "float32"])
    assert not found.failed and found.folder is None and "## Decode" in capsys.readouterr().out
    assert not kept.exists()
    options = report.parser("")
    small = options.parse_args([*SMALL])
    assert report.kept_in(small) is None
    assert report.kept_in(options.parse_args([*SMALL, "--out", str(tmp_path / "a/b")])) == tmp_path / "a/b"
    assert report.kept_in(options.parse_args([])) == kept and not list(tmp_path.iterdir())
    kept.write_text("no folder")
    with pytest.raises(SystemExit, match="kept: Not a directory; use another folder, by --out FOLDER"):
        vae.main(["--device", "cpu"])


def test_a_simulation_asks_for_its_folder_first(tmp_path: Path, monkeypatch) -> None:
    """Beside its input, which may lie where nothing can be written."""
    name = "2026-11-23-scaling-h200x2.json"
    monkeypatch.setattr(report.tempfile, "TemporaryFile", no_space)
    monkeypatch.setattr(simulate_scaling, "studied", lambda _: pytest.fail("worked before it asked"))
    with pytest.raises(SystemExit, match="results: No space left on device; use another folder"):
        simulate_scaling.main([str(RESULTS / name)])


def no_space(**_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_sections_share_a_budget_and_fail_alone(tmp_path: Path, capsys) -> None:
    now = [0.0]

    def section(name: str, estimate: float, took: float, error: bool = False) -> Section:
        def run(report: Report) -> None:
            now[0] += took
            report.add("Rows", {"section": name, "ms": took})
            if error:
                raise RuntimeError("no such kernel\nand more")

        return Section(name, "", estimate, run)

    report = Report("T", {"device": "cpu"}, tmp_path, "x")
    sections = [section("a", 10, 8, True), section("b", 25, 25), section("c", 15, 22), section("d", 6, 6)]
    run_sections(sections, report, budget=30, clock=lambda: now[0])
    outcomes = {name: facts["outcome"] for name, facts in report.sections.items()}
    assert outcomes == {"a": "failed", "b": "skipped", "c": "done", "d": "skipped"} and report.failed
    assert report.notes[0] == "a failed: RuntimeError: no such kernel" and "22 s are left" in report.notes[1]
    assert "Traceback" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["tables"]["Rows"][1] == {"section": "c", "ms": 22}
    assert "| c | 22 |" in (tmp_path / "x.md").read_text() and len(list(tmp_path.iterdir())) == 2


def test_work_is_what_torch_counts() -> None:
    """Every shape drawn anew; the formula must agree with torch's counter on diffusers' network to the last
    operation. Attention as plain products: torch's counter does not know the CPU's flash kernel.
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
    frames = draw.randint(1, 3)
    rows = 2 * draw.randint(1, 4)
    columns = 2 * draw.randint(1, 4)
    texts = draw.randint(1, 9)
    weights = random_transformer(config, CPU, torch.float32).state_dict()
    latent = torch.randn(1, 16, frames, rows, columns)
    text = torch.randn(1, texts, config.text_dim)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        peers.one_forward(peers.twin(config, weights, CPU), latent, torch.tensor([3.0]), text)()
    counted = forward_flops(config, frames * rows * columns // 4, texts).total
    assert counter.get_total_flops() == counted, config
    # the published total of the 14B leaves out embeddings and head: less than one percent
    case = case_of("Wan2.1-T2V-14B", (1280, 720, 81))
    assert 6523 <= forward_flops(case.config, case.tokens).total / 1e12 <= 6523 * 1.01


def test_kernels_by_kind_and_time() -> None:
    """Overlapping kernels count once as busy, twice in their kinds; microseconds in, milliseconds out."""
    kinds = {
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>": "gemm",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_tilesize256x32x32": "convolution",
        "triton_red_fused__to_copy_add_mul_native_layer_norm_0": "element-wise",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>": "copy",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
    found = breakdown([Span("nvjet", 3000, 5000), Span("flash", 1000, 2000), Span("memcpy", 1500, 2500)])
    expected = {"attention": 1.0, "gemm": 2.0, "copy": 1.0, "busy": 3.5, "span": 4.0, "gaps": 0.5}
    assert {name: ms for name, ms in found.items() if ms} == expected
    spans = [Span("flash", 0, 100), Span("ncclDevKernel_SendRecv", 60, 120), Span("gemm", 100, 150)]
    spans += [Span("Memcpy PtoP (Device -> Device)", 140, 180), Span("gemm", 200, 300)]
    found = hidden_share(spans)
    assert found["communication"] == pytest.approx(100e-6) and found["both"] == pytest.approx(70e-6)
    assert found["neither"] == pytest.approx(20e-6) and found["hidden_share"] == pytest.approx(0.7)


def test_more_gpus_are_as_published() -> None:
    """The kept study is that of the kept measurement, and near it on two GPUs; docs/parallel.md cites it."""
    measured = json.loads((RESULTS / "2026-11-23-scaling-h200x2.json").read_text())
    study = simulate_scaling.studied(measured)
    assert study == json.loads((RESULTS / "2026-11-23-scaling-h200x2-simulated.json").read_text())
    assert len(study["checks"]) == 6 and study["largest_error"] < 0.042
    speedups = {(row["model"], row["gpus"]): f"{row['speedup']:.1f}" for row in study["rows"]}
    for size, four, eight in (
        ("1.3B 480p", "3.7", "7.3"),
        ("14B 480p", "3.8", "7.2"),
        ("14B 720p", "3.9", "7.7"),
    ):
        assert (speedups[f"Wan2.1-T2V-{size}", 4], speedups[f"Wan2.1-T2V-{size}", 8]) == (four, eight)

"""The commands around generation: info, models, doctor, config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Chitu

from chitu_diffusion.media.reading import read_frames


def test_info_shows_the_recipe(chitu: Chitu, tiny_folder: Path) -> None:
    chitu("generate", "a \x1b[31mred cat", "--model", tiny_folder, "--steps", 1, "--seed", 9, "-o", "a.gif")
    code, out, _ = chitu("info", "a.gif")
    assert code == 0
    assert "\x1b" not in out
    assert "params.num_inference_steps" in out
    assert json.loads(chitu("info", "a.gif", "--json")[1])["seed"] == 9
    assert chitu("info", "missing.mp4")[0] == 2


def test_models_ls(chitu: Chitu) -> None:
    code, out, _ = chitu("models", "ls", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) >= {"wan-tiny", "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-T2V-A14B"}
    assert rows["Wan2.2-T2V-A14B"]["kind"] == "text to video, two experts"
    assert "Wan2.1-T2V-14B" in chitu("models", "ls")[1]


def test_models_verify_and_convert(chitu: Chitu, tiny_folder: Path) -> None:
    code, out, err = chitu("models", "convert", tiny_folder, "other")
    assert (code, out) == (0, "other\n"), err
    assert chitu("models", "verify", "other", "--deep")[0] == 0
    assert json.loads(chitu("models", "verify", "other", "--json")[1])["ok"]
    chitu("generate", "cat", "--model", tiny_folder, "--steps", 1, "--seed", 1, "-o", "a.npy")
    chitu("generate", "cat", "--model", "other", "--steps", 1, "--seed", 1, "-o", "b.npy")
    assert (read_frames("a.npy") == read_frames("b.npy")).all()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("transformer/config.json", {"num_layers": -1}),
        ("transformer/config.json", {"ffn_dim": "x"}),
        ("transformer/config.json", {"patch_size": 5}),
        ("vae/config.json", {"z_dim": "x"}),
        ("vae/config.json", {"latents_mean": []}),
        ("vae/config.json", {"dim_mult": []}),
        ("vae/config.json", {"patch_size": 2}),
        ("transformer/config.json", {"eps": -1}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "[none]"}),
        ("text_encoder/config.json", {"num_layers": "x"}),
        ("scheduler/scheduler_config.json", {"flow_shift": "x"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}),
        ("model_index.json", {"transformer_2": -1}),
        ("chitu.json", {"defaults": 5}),
        ("tokenizer/tokenizer_config.json", None),
        ("transformer/diffusion_pytorch_model.safetensors", None),
    ],
)
def test_a_spoilt_part_is_4_for_verify_and_generate(
    chitu: Chitu, tiny_folder: Path, tmp_path: Path, file: str, change: dict[str, object] | None
) -> None:
    """None stands for a folder in the file's place."""
    place = Path(shutil.copytree(tiny_folder, tmp_path / "spoilt")) / file
    if change is None:
        place.unlink()
        place.mkdir()
    else:
        place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    assert chitu("models", "verify", "spoilt")[0] == 4
    code, _, err = chitu("generate", "cat", "--model", "spoilt")
    assert code == 4, err
    assert "unexpected" not in err


def test_nowhere_to_remember_hashes_costs_nothing(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chitu_diffusion.config import cache_dir

    Path("file").write_text("")
    monkeypatch.setenv("CHITU_CACHE_DIR", "file/cache")
    assert chitu("generate", "cat", "--model", tiny_folder, "--steps", 1, "-o", "a.npy")[0] == 0
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_dir({}) is None


def test_a_home_sign_in_the_settings_is_understood(
    chitu: Chitu, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    Path("c.toml").write_text(f'[models]\nckpt_dir = "~/{tiny_folder.name}"\n')
    code, _, err = chitu("generate", "cat", "--config", "c.toml", "--steps", 1, "-o", "a.npy")
    assert code == 0, err


def test_models_pull_offline_is_gentle(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def model_info(self, *_: object, **__: object) -> None:
            raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Offline)
    code, out, err = chitu("models", "pull", "Wan2.1-T2V-1.3B")
    assert (code, out) == (4, "")
    assert "Is this machine online?" in err
    assert "Traceback" not in err
    assert chitu("models", "pull", "wan-tiny")[0] == 2


def test_models_pull_fetches(chitu: Chitu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    wanted: list[tuple[str, Path | None]] = []

    class Hub:
        def model_info(self, *_: object, **__: object) -> SimpleNamespace:
            return SimpleNamespace(siblings=[SimpleNamespace(size=2**60 if "14B" in str(_) else 10)])

    def download(repo: str, local_dir: Path | None = None) -> str:
        wanted.append((repo, local_dir))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    code, out, _ = chitu("models", "pull", "wan2.1-t2v-1.3b", "--to", "here")
    assert (code, out.strip()) == (0, str(tmp_path))
    assert wanted == [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", Path("here"))]
    code, _, err = chitu("models", "pull", "Wan-AI/Wan2.1-T2V-14B", "--to", "here")
    assert code == 3
    assert "choose another disk" in err


def test_doctor(chitu: Chitu, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, err = chitu("doctor", "--model", tiny_folder)
    assert code == 0, out
    assert "libx264" in out
    assert "chitu generate" in err
    code, out, _ = chitu("doctor", "--model", "wan-tony", "--json")
    report = json.loads(out)
    kernels = {
        finding["name"]: finding for finding in report["findings"] if finding["name"].startswith("attention ")
    }
    assert kernels["attention sdpa"]["status"] == "ok"
    # where there is no GPU, nothing helps a kernel that wants one
    assert not any(kernel["remedy"] for kernel in kernels.values() if "not on cpu" in kernel["found"])
    assert "another" not in " ".join(finding["remedy"] for finding in report["findings"])
    assert "lossy" in kernels["attention fa3_fp8"]["found"]
    assert code == 4
    assert not report["ok"]
    lacks = [finding for finding in report["findings"] if finding["status"] == "lack"]
    assert all(finding["remedy"] for finding in lacks)
    assert "Did you mean" in lacks[-1]["found"]


def test_config_show_tells_origins(chitu: Chitu, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.toml").write_text('[output]\ndir = "elsewhere"\n[infer]\nsampler = "euler"\n')
    monkeypatch.setenv("CHITU_INFER__SAMPLER", "dpm++")
    code, out, _ = chitu("config", "show", "--config", "c.toml", "--set", "infer.threads=2", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["output.dir"] == {"value": "elsewhere", "origin": "file c.toml"}
    assert told["infer.sampler"] == {"value": "dpm++", "origin": "env CHITU_INFER__SAMPLER"}
    assert told["infer.threads"] == {"value": 2, "origin": "flag"}
    assert told["models.name"]["origin"] == "default"
    assert "env CHITU_INFER__SAMPLER" in chitu("config", "show")[1]

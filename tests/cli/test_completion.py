"""What the shell offers, by the protocol by which it asks: in a process of its own, without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from chitu_diffusion.attention import KERNELS
from chitu_diffusion.cli import completion
from chitu_diffusion.flexcache.registry import STRATEGIES
from chitu_diffusion.models.registry import model_names

PROGRAM = """
import sys
from chitu_diffusion.__main__ import main
try:
    main()
finally:
    print(*sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


def ask(shell: str, *words: str) -> list[str]:
    """What may stand for the last of the words."""
    asked = {
        "bash": {"COMP_WORDS": " ".join(("chitu", *words)), "COMP_CWORD": str(len(words))},
        "zsh": {"_TYPER_COMPLETE_ARGS": " ".join(("chitu", *words))},
    }[shell]
    environment = {**os.environ, **asked, "_CHITU_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.stderr.strip(), f"loaded, or said: {done.stderr}"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("gen",), {"generate"}),
        (("eval", "adh"), {"adherence"}),
        (("generate", "cat", "--mod"), {"--model"}),
        (("generate", "cat", "--model", "Wan2.1-T"), {"Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"}),
        (("models", "pull", "Wan2.2-T2"), {"Wan2.2-T2V-A14B"}),
        (("generate", "cat", "--cache", "te"), {"teacache"}),
        (("generate", "cat", "--sampler", "uni"), {"unipc"}),
        (("batch", "rows.txt", "--attention", "ma"), {"math"}),
        (("generate", "cat", "--set", "infer.sam"), {"infer.sampler="}),
        (("generate", "cat", "--set", "infer.attn_type=sd"), {"infer.attn_type=sdpa"}),
        (("reproduce", "--che"), {"--check"}),
    ],
)
def test_bash(words: tuple[str, ...], offered: set[str]) -> None:
    assert set(ask("bash", *words)) == offered


def test_zsh() -> None:
    assert any("teacache" in line for line in ask("zsh", "generate", "cat", "--cache", "tea"))


def test_names_are_those_that_there_are() -> None:
    assert set(completion.kernels("")) == {"auto", *KERNELS}
    assert completion.caches("") == list(STRATEGIES)
    assert completion.models("") == model_names()
    assert {"unipc", "euler", "dpm++"} <= set(completion.samplers(""))
    assert completion.settings("infer.fused=") == ["infer.fused=true", "infer.fused=false"]
    assert completion.settings("infer.threads=") == []
    assert "infer.dtype=bfloat16" in completion.settings("infer.dtype=")


def test_a_script_for_the_shell_can_be_had() -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [sys.executable, "-m", "chitu_diffusion", "--show-completion", "bash"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "_CHITU_COMPLETE=complete_bash" in done.stdout, done.stderr

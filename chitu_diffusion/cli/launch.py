"""`--gpus N`: the same command line in N processes of this machine, through torch.distributed's own launcher.

Knows processes and command lines; everything was checked before. Where there is no GPU, the workers share the
CPU.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chitu_diffusion.distributed.host import usable_cores
from chitu_diffusion.errors import RankLostError, UsageError

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.distributed.plan import ParallelPlan
    from chitu_diffusion.models.spec import ModelSpec

INTERRUPTED = 130


def check_layout(config: EngineConfig, spec: ModelSpec, asked_gpus: int | None) -> ParallelPlan | None:
    """The layout that `--gpus` and the settings make; None for one of many ranks, which agree on it later.

    Raises:
        UsageError: it does not fit the model, or the machine has not that many GPUs; naming what to use.
    """
    from chitu_diffusion.config import rank_place
    from chitu_diffusion.distributed.plan import plan_for

    if asked_gpus is None and rank_place() is not None:
        return None
    gpus = asked_gpus or 1
    asked = config.infer.diffusion
    heads = spec.transformers[0].num_attention_heads
    plan = plan_for(gpus, heads, cfg=asked.cfg_size, cp=asked.cp_size, ulysses=asked.ulysses_degree)
    if gpus > 1 and config.infer.device != "cpu":
        import torch

        count = torch.cuda.device_count()
        if 0 < count < gpus:
            raise UsageError(f"--gpus {gpus}: this machine has {count}; use at most {count}", field="gpus")
    return plan


def launch(words: Sequence[str], gpus: int, config: EngineConfig) -> int:
    """Run a command line in `gpus` processes.

    Args:
        words: what stands after `chitu`.
        gpus: how many workers.
        config: the settings that the words make.

    Returns:
        the workers' exit code; 130 after Ctrl+C.

    Raises:
        RankLostError: a signal ended one.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the workers tell their own errors; the launcher would tell them again, with tracebacks of its own
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = ["-m", "chitu_diffusion", *without_gpus(words)]
    if config.infer.threads is None and not torch.cuda.is_available():
        command += ["--set", f"infer.threads={max(1, usable_cores() // gpus)}"]
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="chitu",
    )
    settings.max_restarts = 0
    try:
        elastic_launch(settings, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        rank, first = error.get_first_failure()
        if first.exitcode < 0 and all(code == INTERRUPTED for code in codes):
            # nobody went by itself having told why; the others may only know that they were to end
            told = (
                f"rank {rank} of {gpus} (process {first.pid}) was ended by {first.signal_name()}; "
                f"{_next(first.exitcode)}"
            )
            raise RankLostError(told) from None
        return min(codes)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    return 0


def _next(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "the system does so where memory ran out, which its log tells ('dmesg'): less at once, or "
            "'--low-mem-level 4'"
        )
    return "the same command starts again"


def without_gpus(words: Sequence[str]) -> list[str]:
    """The command line for one worker."""
    kept = []
    skip = False
    for word in words:
        if not skip and word != "--gpus" and not word.startswith("--gpus="):
            kept.append(word)
        skip = word == "--gpus"
    return kept

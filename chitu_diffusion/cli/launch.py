"""`--gpus N`: the same command line in N processes of this machine.

The launcher imports the engine once, and each rank is a fork of it; they meet in its memory, over sockets
that nobody else can reach. It knows its ranks as its children: when one ends in failure it ends the others,
it hands on Ctrl+C and its like, and no rank outlives it. Where there is no GPU, the ranks share the CPU.
Knows processes and command lines; everything was checked before.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from chitu_diffusion.distributed.host import usable_cores
from chitu_diffusion.errors import RankLostError, UsageError

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.distributed.plan import ParallelPlan
    from chitu_diffusion.distributed.stores import StoreServer
    from chitu_diffusion.models.spec import ModelSpec

INTERRUPTED = 130
_PATIENCE = 30.0
"""Seconds that ranks have to end, once they were told to."""
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class CommandLine:
    """What stands after `chitu`, and what carries such words out and gives their exit code."""

    words: Sequence[str]
    run: Callable[[Sequence[str]], int]


class RankEnd(NamedTuple):
    """How a rank's process ended: its number, and its exit code or, negative, the signal that ended it."""

    process: int
    code: int


def check_layout(config: EngineConfig, spec: ModelSpec, asked_gpus: int | None) -> ParallelPlan | None:
    """The layout that `--gpus` and the settings make; None for one of many ranks, which agree on it later.

    Raises:
        UsageError: it does not fit the model, or the machine has not that many GPUs; naming what to use.
    """
    from chitu_diffusion.config import rank_place

    if asked_gpus is None and rank_place() is not None:
        return None
    gpus = asked_gpus or 1
    plan = layout_of(config, spec, gpus)
    if gpus > 1 and config.infer.device != "cpu":
        import torch

        count = torch.cuda.device_count()
        if 0 < count < gpus:
            raise UsageError(f"--gpus {gpus}: this machine has {count}; use at most {count}", field="gpus")
    return plan


def layout_of(config: EngineConfig, spec: ModelSpec, world: int) -> ParallelPlan:
    """The layout of so many ranks that the settings make.

    Raises:
        UsageError: it does not fit the model; names what to use.
    """
    from chitu_diffusion.distributed.plan import plan_for

    asked = config.infer.diffusion
    heads = spec.transformers[0].num_attention_heads
    return plan_for(world, heads, cfg=asked.cfg_size, cp=asked.cp_size, ulysses=asked.ulysses_degree)


def launch(command: CommandLine, gpus: int, config: EngineConfig) -> int:
    """Carry out a command line in `gpus` processes.

    Args:
        command: as the user typed it.
        gpus: how many.
        config: the settings that the words make.

    Returns:
        the ranks' exit code; 130 after Ctrl+C.

    Raises:
        RankLostError: a signal ended one.
    """
    import chitu_diffusion.engine  # noqa: F401  here, and so only once
    from chitu_diffusion.distributed.stores import StoreServer

    variables: dict[str, object] = {"WORLD_SIZE": gpus, "LOCAL_WORLD_SIZE": gpus}
    if config.infer.threads is None:
        variables["CHITU_INFER__THREADS"] = max(1, usable_cores() // gpus)
    command = CommandLine(without_gpus(command.words), command.run)
    server = StoreServer()
    processes: list[int] = []
    launcher = os.getpid()
    with _signals() as signals:
        try:
            for rank in range(gpus):
                theirs = server.connect()
                variables |= {"RANK": rank, "LOCAL_RANK": rank, "CHITU_RANKS_SOCKET": theirs.fileno()}
                sys.stdout.flush()
                sys.stderr.flush()
                process = os.fork()
                if process == 0:
                    _be_rank(command, variables, theirs, server, launcher)
                theirs.close()
                processes.append(process)
            ends, asked = _serve(server, processes, signals)
        finally:
            # none is left but after an error: our own children, that nobody has buried
            for process in processes:
                _kill_child(process)
    return exit_code(ends, asked=asked)


def _be_rank(
    command: CommandLine,
    variables: dict[str, object],
    connection: socket.socket,
    server: StoreServer,
    launcher: int,
) -> NoReturn:
    """A rank's whole life, in a fresh fork."""
    code = 1
    try:
        import torch

        from chitu_diffusion.config import set_rank_variables
        from chitu_diffusion.distributed.host import end_with_parent

        server.close()
        os.setsid()  # the terminal's Ctrl+C comes by the launcher alone
        signal.set_wakeup_fd(-1)
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        end_with_parent(f"chitu-rank-{variables['RANK']}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_HANDED_ON, signal.SIGCHLD))
        if os.getppid() != launcher:
            raise RankLostError("the launcher is lost")
        set_rank_variables(variables)
        if torch.cuda._is_in_bad_fork():
            # something had asked CUDA before the fork: begin anew, in the same process
            connection.set_inheritable(True)
            os.execv(sys.executable, [sys.executable, "-m", "chitu_diffusion", *command.words])
        code = command.run(command.words)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket from which the numbers of signals can be read as they come; none is raised. Blocked until the
    ranks are started, for a fork would write into it, too.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    kinds = [each for each in _HANDED_ON if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.getsignal(each) for each in (*kinds, signal.SIGCHLD)}
    signal.pthread_sigmask(signal.SIG_BLOCK, before)
    woken = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    for each in before:
        signal.signal(each, lambda number, frame: None)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(woken)
        for each, handler in before.items():
            signal.signal(each, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        reading.close()
        writing.close()


def _serve(
    server: StoreServer, processes: list[int], signals: socket.socket
) -> tuple[dict[int, RankEnd], bool]:
    """Answer the ranks until all have ended.

    Returns:
        how each ended, in that order, and whether we were asked to stop.
    """
    ranks = {process: rank for rank, process in enumerate(processes)}
    ends: dict[int, RankEnd] = {}
    asked = False
    deadline: float | None = None
    selector = selectors.DefaultSelector()
    for watched in (signals, *server.connections):
        selector.register(watched, selectors.EVENT_READ)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_HANDED_ON, signal.SIGCHLD))
    while processes:
        ready = {key.fileobj for key, _ in selector.select(1.0)}
        came = signals.recv(64) if signals in ready else b""
        for connection in ready - {signals}:
            assert isinstance(connection, socket.socket)
            if not server.answer(connection):
                selector.unregister(connection)
        if not set(came) <= {signal.SIGCHLD}:
            # the second time they are not asked
            _send(processes, signal.SIGKILL if asked else signal.SIGINT)
            asked = True
            deadline = time.monotonic() + _PATIENCE
        ended = _ended(processes) if came or not ready else []
        for end in ended:
            processes.remove(end.process)  # buried: its number may be anybody's from now on
            ends[ranks[end.process]] = end
        if deadline is None and any(end.code != 0 for end in ended):
            _send(processes, signal.SIGTERM)
            deadline = time.monotonic() + _PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
    return ends, asked


def _ended(processes: Sequence[int]) -> list[RankEnd]:
    """The children that have ended; with that they are buried."""
    found = [os.waitpid(process, os.WNOHANG) for process in processes]
    return [RankEnd(process, os.waitstatus_to_exitcode(status)) for process, status in found if process]


def _send(processes: Sequence[int], number: signal.Signals) -> None:
    """To children of ours that are not buried, so nobody else can have their numbers."""
    for process in processes:
        os.kill(process, number)


def _kill_child(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def exit_code(ends: Mapping[int, RankEnd], *, asked: bool) -> int:
    """What the ranks' ends come to.

    Args:
        ends: by rank, in the order in which they came.
        asked: they were told to end.

    Raises:
        RankLostError: a signal ended one, and none of the others has told of it.
    """
    failed = [rank for rank, end in ends.items() if end.code != 0]
    if not failed:
        return 0
    if asked:
        return INTERRUPTED
    codes = [end.code for end in ends.values() if end.code > 0]
    first = ends[failed[0]]
    if first.code < 0 and all(code == INTERRUPTED for code in codes):
        # nobody went by itself having told why; the others may only know that they were to end
        name = signal.Signals(-first.code).name
        who = f"rank {failed[0]} of {len(ends)} (process {first.process})"
        raise RankLostError(f"{who} was ended by {name}; {_next(first.code)}")
    return min(codes)


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

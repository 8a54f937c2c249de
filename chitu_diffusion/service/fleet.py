"""A fleet: `chitu worker` processes on a Ray cluster's nodes, as many as were asked for.

Ray places them, and starts them again where a process or a node is lost. Knows no job: jobs, leases and
fences stay with the store, whose URL is in a file on each node. Alone in knowing Ray, which is imported late.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from chitu_diffusion.config import require_ray_token
from chitu_diffusion.errors import UsageError, counted

_NAMESPACE = "chitu"
_PREFIX = "worker-"
_ANSWER_S = 5.0
_PLACED_S = 30.0
_LONGEST_WAIT_S = 30.0
_SOUND_S = 60.0
"""A worker that ran so long is started again at once."""
_MARGIN_S = 15.0
"""Beyond what parking may take, until a worker is killed."""
_KNOCK = "import sys, ray; ray.init(address=sys.argv[1], configure_logging=False, log_to_driver=False)"


@dataclass(frozen=True)
class FleetSpec:
    """What a worker needs to start, and all that goes through Ray; paths are the same on each node."""

    model: str
    data: str
    store_file: str
    config: str | None
    gpus: int
    cpus: int

    def words(self) -> list[str]:
        """After `chitu`."""
        words = ["worker", "--model", self.model, "--data", self.data, "--store-file", self.store_file]
        return words if self.config is None else [*words, "--config", self.config]


@dataclass(frozen=True)
class FleetNode:
    """A machine of the cluster, and what it has in all."""

    id: str
    host: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class FleetWorker:
    """A worker's place. `node` is empty while it waits for one; `ended` says how it ended the last time."""

    name: str
    node: str = ""
    host: str = ""
    pid: int = 0
    starts: int = 0
    ended: str = ""
    versions: Mapping[str, str] | None = None
    spec: FleetSpec | None = None


def plan(nodes: Sequence[FleetNode], workers: int, gpus: int, cpus: int) -> tuple[dict[str, int], int]:
    """Where workers have room, the emptiest node first.

    Returns:
        workers by node, and how many wait for a place.
    """
    room = {node.id: min([node.cpus // cpus, *([node.gpus // gpus] if gpus else [])]) for node in nodes}
    placed = dict.fromkeys(room, 0)
    for number in range(workers):
        free = max(room, key=lambda each: room[each] - placed[each], default=None)
        if free is None or placed[free] >= room[free]:
            return placed, workers - number
        placed[free] += 1
    return placed, 0


class WorkerAgent:
    """Keeps one `chitu worker` process running on its node; ends with it, however it ends.

    Args:
        command: in place of the worker's.
    """

    def __init__(self, spec: FleetSpec, command: Sequence[str] | None = None) -> None:
        self._spec = spec
        own = [sys.executable, "-m", "chitu_diffusion", *spec.words(), "--parent", str(os.getpid())]
        self._command = own if command is None else list(command)
        self._stopped = threading.Event()
        self._starting = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._starts = 0
        self._ended = ""
        # the system ends a process with the thread that started it
        self._keeping = threading.Thread(target=self._keep, daemon=True)
        self._keeping.start()

    def _keep(self) -> None:
        wait = 0.0
        while not self._stopped.wait(wait):
            began = time.monotonic()
            with self._starting:
                if self._stopped.is_set():
                    return
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,
                )
                self._process = process
                self._starts += 1
            said = ""
            for line in process.stderr or ():
                sys.stderr.write(line)
                said = line.strip() or said
            self._ended = f"exit {process.wait()}: {said}"
            is_sound = time.monotonic() - began > _SOUND_S
            wait = 0.0 if is_sound else min(_LONGEST_WAIT_S, max(1.0, 2 * wait))

    def status(self) -> dict[str, Any]:
        """Of `FleetWorker`, but its name."""
        import ray

        process = self._process
        lives = process is not None and process.poll() is None
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "pid": process.pid if process is not None and lives else 0,
            "starts": self._starts,
            "ended": self._ended,
            "versions": _versions(),
            "spec": self._spec,
        }

    def stop(self, patience_s: float) -> None:
        """Have the worker park what it runs and end; after `patience_s` it is killed."""
        with self._starting:
            self._stopped.set()
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            self._keeping.join(patience_s)
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                self._keeping.join(_ANSWER_S)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("chitu_diffusion", "torch", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its folder
            found[package] = "not installed"
    return found


class Fleet:
    """The workers of the cluster that this process is connected to; see `connected`."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray = ray
        self._address = address

    def nodes(self) -> list[FleetNode]:
        """Those that live."""
        return [
            FleetNode(
                node["NodeID"],
                node["NodeManagerHostname"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def workers(self, timeout_s: float = _ANSWER_S) -> list[FleetWorker]:
        """All that were asked for; those that answer in time have a node."""
        return list(self._ask(self._names(), timeout_s).values())

    def _names(self) -> list[str]:
        names = [name for name in self._ray.util.list_named_actors() if name.startswith(_PREFIX)]
        return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)))

    def _ask(self, names: Sequence[str], timeout_s: float) -> dict[str, FleetWorker]:
        found = {name: FleetWorker(name) for name in names}
        asked = {}
        for name in names:
            with suppress(ValueError):  # it has ended since
                asked[self._ray.get_actor(name).status.remote()] = name
        if not asked:
            return found
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        for answer in ready:
            name = asked[answer]
            with suppress(self._ray.exceptions.RayActorError):  # its node is lost
                found[name] = FleetWorker(name, **self._ray.get(answer))
        return found

    def up(self, spec: FleetSpec, workers: int) -> list[FleetWorker]:
        """Have so many; those that there are stay.

        Raises:
            UsageError: the cluster lets in who has no token; or workers of another kind run.
        """
        self._refuse_open_cluster()
        have = self.workers()
        if any(worker.spec not in (None, spec) for worker in have):
            raise UsageError("workers with other settings run; 'chitu fleet drain' parks and ends them first")
        taken = {worker.name for worker in have}
        free = (name for number in range(len(taken) + workers) if (name := f"{_PREFIX}{number}") not in taken)
        kind = self._ray.remote(WorkerAgent)
        for name in [next(free) for _ in range(workers - len(have))]:
            kind.options(
                name=name,
                lifetime="detached",
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                max_restarts=-1,
                max_concurrency=2,
                scheduling_strategy="SPREAD",
            ).remote(spec)
        _, waiting = plan(self.nodes(), max(workers, len(have)), spec.gpus, spec.cpus)
        return self.workers(_ANSWER_S if waiting else _PLACED_S)

    def scale(self, workers: int, drain_s: float) -> list[FleetWorker]:
        """Have so many: start more, or park and end those that wait for a place, and the last.

        Raises:
            UsageError: no worker says what more would be; or see `up`.
        """
        have = self.workers()
        if workers > len(have):
            spec = next((worker.spec for worker in have if worker.spec is not None), None)
            if spec is None:
                raise UsageError("no worker runs whose like could be started; 'chitu fleet up' says which")
            return self.up(spec, workers)
        placed_first = sorted(have, key=lambda worker: worker.spec is None)
        self._end(placed_first[workers:], drain_s)
        return self.workers()

    def drain(self, hosts: Collection[str], drain_s: float) -> int:
        """Park what runs on these nodes (ids, or hosts), and end their workers; on all, where none is named.

        Returns:
            how many.

        Raises:
            UsageError: no such node.
        """
        known = {name for node in self.nodes() for name in (node.id, node.host)}
        for host in hosts:
            if host not in known:
                raise UsageError(f"no node is {host}; 'chitu fleet status' lists them", field="node")
        leaving = [each for each in self.workers() if not hosts or {each.node, each.host} & set(hosts)]
        self._end(leaving, drain_s)
        return len(leaving)

    def down(self) -> int:
        """End all at once; their jobs go on as after a crash. How many."""
        names = self._names()
        self._remove(names)
        return len(names)

    def _end(self, workers: Sequence[FleetWorker], drain_s: float) -> None:
        patience = drain_s + _MARGIN_S
        placed = [worker.name for worker in workers if worker.spec is not None]
        parking = [self._ray.get_actor(name).stop.remote(patience) for name in placed]
        if parking:
            self._ray.wait(parking, num_returns=len(parking), timeout=patience + _MARGIN_S)
        self._remove([worker.name for worker in workers])

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(ValueError):  # it has ended since
                self._ray.kill(self._ray.get_actor(name), no_restart=True)
        late = time.monotonic() + _ANSWER_S
        while set(self._names()) & set(names) and time.monotonic() < late:
            time.sleep(0.05)

    def _refuse_open_cluster(self) -> None:
        """One that asks for no token runs what anybody likes. It takes a needless one, so try without."""
        knock = [
            "env",
            "RAY_AUTH_MODE=disabled",
            "RAY_NUM_REDIS_GET_RETRIES=1",
            sys.executable,
            "-c",
            _KNOCK,
            self._address,
        ]
        try:
            done = subprocess.run(knock, capture_output=True, check=False, timeout=_PLACED_S)
        except subprocess.TimeoutExpired:
            return
        if done.returncode == 0:
            raise UsageError(
                "this Ray cluster asks for no token; 'ray get-auth-token --generate', copy ~/.ray/auth_token "
                "to each node, and start all with RAY_AUTH_MODE=token"
            )


@contextmanager
def connected(address: str | None) -> Iterator[Fleet]:
    """The fleet of a cluster, of which this machine is a node.

    Args:
        address: HOST:PORT of its head; None: of the Ray that runs here.

    Raises:
        UsageError: Ray is not installed, does not run, or refuses this machine's token.
    """
    require_ray_token()
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError(
            "a fleet needs ray, which is not installed; pip install 'chitu_diffusion[fleet]'"
        ) from error
    place = address or "auto"
    try:
        ray.init(address=place, namespace=_NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        # which of the two it was Ray does not always say
        raise UsageError(
            f"no Ray runs at {place}, or it refuses this machine's token: every node needs the same "
            "~/.ray/auth_token ('ray get-auth-token --generate' makes one); then, with RAY_AUTH_MODE=token, "
            "'ray start --head --port=6379', and on each node 'ray start --address=HEAD:6379'",
            field="--address",
        ) from error
    try:
        yield Fleet(ray, place)
    finally:
        ray.shutdown()


def differing(workers: Sequence[FleetWorker]) -> list[str]:
    """Packages that are of several versions, in words."""
    found: dict[str, dict[str, int]] = {}
    for worker in workers:
        for package, has in (worker.versions or {}).items():
            counts = found.setdefault(package, {})
            counts[has] = counts.get(has, 0) + 1
    return [
        f"{package}: " + ", ".join(f"{has} ({counted(count, 'worker')})" for has, count in counts.items())
        for package, counts in found.items()
        if len(counts) > 1
    ]

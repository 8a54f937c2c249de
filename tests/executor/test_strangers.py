"""Another process of the same machine that writes wherever it can: nobody hears it, nothing is ended, and the
video is the same.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from listening import ports_of
from ranks import new_store, start_ranks, wait_for
from running import CAT, config_for

from chitu_diffusion.config import RankPlace
from chitu_diffusion.distributed.stores import SignedStore, SocketStore, StoreServer
from chitu_diffusion.engine import Engine
from chitu_diffusion.errors import RankLostError, UsageError
from chitu_diffusion.executor import meeting
from chitu_diffusion.executor.heartbeat import HeartbeatMonitor
from chitu_diffusion.executor.meeting import meet, ranks_secret
from chitu_diffusion.executor.messages import without_controls

WORDS = 2000
STEPS = 100


def make(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    config = config_for(Path(folder), Path(out))
    # a stranger hides signs of life as fast as they are mended; on busy cores that may be for seconds
    config.ranks.heartbeat_timeout = 60
    engine = Engine(config, place=RankPlace(rank, world, store=store))
    Path(out, f"begun-{rank}").touch()
    if rank == 0:
        engine.submit(CAT, seed=3, num_inference_steps=STEPS, save_path=f"{out}/two.npy")
        engine.run_until_idle()
        engine.close()
    else:
        engine.run_worker()


class Stranger(threading.Thread):
    """Overwrites what it finds in a store with noise, old words and forged ones, until it is told to stop."""

    def __init__(self, port: int, process: int) -> None:
        super().__init__(daemon=True)
        self._store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        self._store.set_timeout(timedelta(seconds=0.1))
        self._forged = json.dumps(
            {"host": "\x1b[31mevil", "pid": process, "machine": None, "aborted": 1, "reason": "\x1b]0;x\x07"}
            | {"leaving": False, "number": 10**6, "status": "x", "stack": None}
        )
        self.words = 0
        self.keys: set[str] = set()
        self.stop = threading.Event()

    def run(self) -> None:
        noise = random.Random(1)
        old: list[bytes] = []
        while not self.stop.wait(0.01):
            for key in [key for key in self._store.list_keys() if "chitu" in key]:
                try:
                    old.append(self._store.get(key))
                except dist.DistStoreError:
                    continue
                except dist.DistNetworkError:
                    return  # the store has gone
                forged = [self._forged, noise.randbytes(60), noise.choice(old), b"", b"null"]
                self._store.set(key, noise.choice(forged))  # type: ignore[arg-type]
                self.keys.add(key.rpartition("/")[0].rpartition("chitu/")[2])
                self.words += 1


def noise_into(ports: set[tuple[str, int]]) -> None:
    noise = random.Random(2)
    for host, port in ports:
        for size in (1, 8, 4096):
            with socket.create_connection((host, port), timeout=5) as stranger:
                stranger.sendall(noise.randbytes(size))


@pytest.mark.parametrize("from_the_start", [True, False])
def test_ranks_do_not_hear_strangers(tiny_folder: Path, tmp_path: Path, from_the_start: bool) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    store = new_store()
    stranger = Stranger(store.port, victim.pid)
    if from_the_start:
        stranger.start()
    ranks = start_ranks(2, make, str(tiny_folder), str(tmp_path), store=store, errors=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("begun-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    if not from_the_start:
        stranger.start()
    ports = ports_of(process.pid or 0 for process in ranks)
    assert ports and {host for host, _ in ports} == {"127.0.0.1"}
    noise_into(ports)
    while stranger.words < WORDS and all(process.is_alive() for process in ranks):
        time.sleep(0.02)
    stranger.stop.set()
    stranger.join()
    wait_for(ranks, 60)
    assert not [file.read_text() for file in tmp_path.glob("*.txt")]
    assert [process.exitcode for process in ranks] == [0, 0]
    assert stranger.words > 50 and {"heartbeat", "nonce"} <= stranger.keys
    assert victim.poll() is None
    victim.kill()
    victim.wait()
    config = config_for(tiny_folder, tmp_path)
    config.infer.diffusion.cfg_batch = "sequential"  # as a branch a rank
    with Engine(config) as engine:
        engine.submit(CAT, seed=3, num_inference_steps=STEPS, save_path=str(tmp_path / "one.npy"))
        engine.run_until_idle()
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


# -- stores


def test_a_word_that_is_not_signed_is_not_there() -> None:
    base = dist.HashStore()
    ours = SignedStore(base, b"secret of ours")
    theirs = SignedStore(base, b"a guess")
    ours.set("status/1/0", "well")
    assert ours.get("status/1/0") == b"well" and theirs.peek("status/1/0") is None
    sealed = base.get("chitu/status/1/0")
    base.set("chitu/status/2/0", sealed)  # said again of another round
    assert not ours.check(["status/2/0"])
    for forged in (sealed[:-1], sealed + b"x", bytes([sealed[0] ^ 1]) + sealed[1:], b"", b"well"):
        base.set("chitu/status/1/0", forged)
        assert not ours.check(["status/1/0"])
    ours.mend()
    assert ours.get("status/1/0") == b"well"
    before = base.get("chitu/status/1/0")
    ours.bind(b"nonces of this run")
    base.set("chitu/status/1/0", before)
    assert ours.peek("status/1/0") is None
    ours.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(dist.DistStoreError, match="nobody has set status/1/0 within 0.05 s"):
        ours.get("status/1/0")


@pytest.fixture
def served():
    """A launcher's server in a thread, and a rank's store."""
    server = StoreServer()
    store = SocketStore(server.connect(), 1.0)
    (ours,) = server.connections
    ours.settimeout(None)
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set() and server.answer(ours):
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server, store
    store._connection.close()
    thread.join(5)


def test_the_launchers_store_is_one(served) -> None:
    server, store = served
    assert store.secret() == server.secret.encode()
    assert not store.check(["a"]) and store.peek("a") is None
    store.set("a", b"\x00\xff" * 300_000)  # more than a pipe holds
    assert store.get("a") == b"\x00\xff" * 300_000
    assert (store.add("n", 2), store.add("n", 3), store.get("n")) == (2, 5, b"5")
    assert store.delete_key("a") and not store.delete_key("a") and not store.check(["a", "n"])


def test_a_question_that_ctrl_c_cuts_short_spoils_no_other(served) -> None:
    _, store = served
    store.set("a", "1")
    for left in (b"\n[", b'\n["old", "get", "a"]\n', b"\n[]\nx\n"):
        store._connection.sendall(left)
        store._unread += b'ld", "'  # the rest of an answer of which the beginning is lost
        store._unread += b'MQ=="]\n'
        assert store.get("a") == b"1"


def test_a_launcher_that_stands_still_is_gone_for_good() -> None:
    server = StoreServer()
    store = SocketStore(server.connect(), 0.1)
    for _ in range(2):
        with pytest.raises(dist.DistNetworkError, match="the launcher does not answer"):
            store.check(["a"])


# -- meeting


def test_a_wait_says_for_whom_and_ends(monkeypatch, caplog) -> None:
    monkeypatch.setattr(meeting, "_SAID_AFTER", 0.1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RankLostError, match=r"rank 1 has waited 0.4 s for ranks 0, 2 of 3.*unset RANK"):
        meet(1, 3, dist.HashStore(), b"a secret of sixteen", 0.4)
    assert "rank 1 waits for ranks 0, 2 of 3, 0.4 s at most" in caplog.text
    with pytest.raises(RankLostError, match=r"rank 1 has waited 0.2 s for rank 0 of 3"):
        meet(1, 3, dist.HashStore(), None, 0.2)


def test_rank_0s_secret_is_read_from_a_file_that_is_ours_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(meeting.tempfile, "gettempdir", lambda: str(tmp_path))
    base = dist.HashStore()
    folder, secret = meeting._write_private()
    (tmp_path / folder.name).mkdir(exist_ok=True)
    SignedStore(base, secret).set("nonce/0", "x")
    assert meeting._handed_over(base) is None
    for name in ("../etc", "chitu-ranks-/..", "chitu-ranks-none", "\x1b", folder.name + "\n"):
        base.set("chitu/secret", name)
        assert meeting._handed_over(base) is None
    base.set("chitu/secret", folder.name)
    assert meeting._handed_over(base) is not None
    os.chmod(folder / "secret", 0o640)
    assert meeting._handed_over(base) is None


def test_the_users_secret(tmp_path: Path, monkeypatch) -> None:
    assert ranks_secret() is None
    monkeypatch.setenv("CHITU_RANKS_SECRET", "short")
    with pytest.raises(UsageError, match="5 characters: use 16 or more; make one with"):
        ranks_secret()
    file = tmp_path / "ranks.secret"
    monkeypatch.setenv("CHITU_RANKS_SECRET_FILE", str(file))
    for mode in (None, 0o644, 0o600):
        if mode is not None:
            file.write_text("0123456789abcdef\n")
            file.chmod(mode)
        if mode == 0o600:
            assert ranks_secret() == b"0123456789abcdef"
        else:
            with pytest.raises(UsageError, match="no file of yours that is closed to others"):
                ranks_secret()


def test_several_machines_without_a_secret_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ranks.secret.*CHITU_RANKS_SECRET_FILE=ranks.secret torchrun"):
        Engine(config_for(tiny_folder, tmp_path), place=RankPlace(0, 4, 0, 2, store=dist.HashStore()))


# -- heartbeats


def monitor_of(rank: int, store: dist.Store) -> HeartbeatMonitor:
    quiet = {"cancel": lambda why, generation=None: None, "waiting": lambda: 0.0}
    return HeartbeatMonitor(rank, 2, store, heartbeat_timeout=2.5, timeout=60, **quiet)


@pytest.mark.parametrize("verified", [False, True])
def test_only_a_process_that_is_known_to_be_a_rank_is_ended(verified: bool) -> None:
    """One heartbeat names a process; only a second one shows that it was that rank's at the time."""
    store = new_store()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monitor = monitor_of(0, store)
    for number in range(1 + verified):
        words = {**monitor._heartbeat(), "pid": other.pid, "number": number, "status": "x\x1b[2J"}
        store.set("heartbeat/1", json.dumps(words))
        time.sleep(1.3)
    deadline = time.monotonic() + 10
    while monitor.lost is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert "rank 1 of 2" in str(monitor.lost) and "no sign of life" in str(monitor.lost)
    assert "\x1b" not in str(monitor.lost)
    assert (other.poll() is not None) == verified
    other.kill()
    other.wait()
    monitor.leave()


def test_an_old_heartbeat_is_no_sign_of_life() -> None:
    store = new_store()
    monitor = monitor_of(0, store)
    words = monitor._heartbeat()
    store.set("heartbeat/1", json.dumps({**words, "number": 5}))
    deadline = time.monotonic() + 10
    while monitor.lost is None and time.monotonic() < deadline:
        store.set("heartbeat/1", json.dumps({**words, "number": 4}))
        time.sleep(0.1)
    assert "no sign of life for 2.5 s" in str(monitor.lost)
    monitor.leave()


@pytest.mark.parametrize("words", ["{}", "[]", "x", '{"number": "1"}', "null"])
def test_a_heartbeat_that_cannot_be_read_is_told_of(words: str) -> None:
    store = new_store()
    store.set("heartbeat/1", words)
    monitor = monitor_of(0, store)
    deadline = time.monotonic() + 5
    while monitor.lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "its heartbeat cannot be read" in str(monitor.lost)
    monitor.leave()


def test_texts_of_other_ranks_steer_no_terminal() -> None:
    told = without_controls(["a\x1b[31m\nb\r\x07\u202e", {"c": "\x9bd", "e": 1}, None])
    assert told == ["a [31m\nb   ", {"c": " d", "e": 1}, None]


def make_on_two_machines(
    rank: int, world: int, store: dist.Store, folder: str, out: str, secrets: tuple[str, ...]
) -> None:
    os.environ["CHITU_RANKS_SECRET"] = secrets[rank]
    config = config_for(Path(folder), Path(out))
    config.ranks.timeout = 3.0
    engine = Engine(config, place=RankPlace(rank, world, 0, 1, store=store))
    if rank == 0:
        engine.submit(CAT, seed=3, num_inference_steps=2, save_path=f"{out}/two.npy")
        engine.run_until_idle()
        engine.close()
    else:
        engine.run_worker()


@pytest.mark.parametrize(
    "secrets", [("the secret of all of us",) * 2, ("the secret of rank 0", "another of rank 1")]
)
def test_ranks_of_several_machines_meet_by_their_secret(tiny_folder: Path, tmp_path: Path, secrets) -> None:
    store = new_store()
    ranks = start_ranks(
        2, make_on_two_machines, str(tiny_folder), str(tmp_path), secrets, store=store, errors=tmp_path
    )
    wait_for(ranks, 60)
    told = [file.read_text() for file in sorted(tmp_path.glob("*.txt"))]
    if len(set(secrets)) == 1:
        assert not told and (tmp_path / "two.npy").exists()
    else:
        assert len(told) == 2 and "rank 0 has waited 3 s for rank 1 of 2" in told[0]
        assert not (tmp_path / "two.npy").exists()

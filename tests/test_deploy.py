"""The files of deploy/: their commands are parsed by the command line's own parser, every setting is one that
there is, probes ask for routes, and dashboard and alerts for metrics that there are.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import yaml
from dockerfile import ROOT, stages_of, variables_of
from fronts import make_front
from prometheus_client.parser import text_string_to_metric_families

from chitu_diffusion.cli.app import build
from chitu_diffusion.service.figures import SupervisorFigures
from chitu_diffusion.service.settings import ServiceConfig, load_service

DEPLOY = ROOT / "deploy"
OTHERS = {
    "PGPASSWORD", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "XDG_CACHE_HOME", "HF_HOME",
}  # fmt: skip
"""Of libpq, of PostgreSQL's image, and of caches."""
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))


def own_services() -> dict[str, Any]:
    return {name: each for name, each in COMPOSE["services"].items() if each["image"] == "chitu"}


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(a pod's specification, each of its containers)"""
    for document in KUBERNETES:
        if document["kind"] in ("Job", "Deployment"):
            pod = document["spec"]["template"]["spec"]
            yield from ((pod, container) for container in pod["containers"])


def unit() -> dict[str, list[str]]:
    """Values of the systemd unit by name; a name may stand several times."""
    lines = (DEPLOY / "chitu-worker.service").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def batch() -> tuple[list[str], list[str]]:
    """(the #SBATCH options, the shell's lines) of the Slurm script."""
    lines = (DEPLOY / "chitu-worker.slurm").read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    return options, [line for line in lines if line and not line.startswith("#")]


def commands() -> list[list[str]]:
    """All words after `chitu`."""
    found = [each["command"] for each in own_services().values()]
    found += [container["args"] for _, container in containers()]
    found.append(shlex.split(unit()["ExecStart"][0])[1:])
    found.append(shlex.split(batch()[1][-1])[3:])
    return found


def parse(words: list[str]) -> None:
    """Raises where the command line would refuse them; runs nothing."""
    left = list(words)
    command: Any = typer.main.get_command(build())
    while hasattr(command, "commands"):
        command = command.commands[left.pop(0)]
    command.make_context("chitu", left)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_those_that_there_are(words: list[str]) -> None:
    parse(words)
    assert words[0] in ("serve", "worker", "store")


def test_a_command_that_there_is_not_is_found() -> None:
    for words in (["worker", "--gpu", "1"], ["serve", "--port", "x"], ["store", "migrat"]):
        with pytest.raises((typer.TyperException, KeyError)):
            parse(words)


def environments() -> list[dict[str, str]]:
    found = [each["environment"] for each in COMPOSE["services"].values()]
    found.append(next(each["data"] for each in KUBERNETES if each["kind"] == "ConfigMap"))
    found.append(dict(word.split("=", 1) for line in unit()["Environment"] for word in line.split()))
    exports = [line for line in batch()[1] if line.startswith("export ")]
    found.append(dict(word.split("=", 1) for line in exports for word in line.split()[1:]))
    return found


@pytest.mark.parametrize("variables", environments())
def test_settings_are_those_that_there_are(variables: dict[str, str]) -> None:
    ours = {name: value for name, value in variables.items() if name.startswith("CHITU_")}
    assert variables.keys() - ours.keys() <= OTHERS
    load_service(None, None, ours)


def test_names_in_comments_are_settings_too() -> None:
    known = set()
    for file in DEPLOY.iterdir():
        known |= set(re.findall(r"CHITU_[A-Z_]+", file.read_text(encoding="utf-8")))
    assert len(known) >= 4
    for name in known:
        value = {"FORMAT": "json", "LEVEL": "info"}.get(name.rpartition("__")[2], "sqlite:///x/chitu.db")
        load_service(None, None, {name: value})


def test_probes_ask_for_routes(tmp_path: Path) -> None:
    from chitu_diffusion.service.app import build_app

    front = make_front(tmp_path)
    routes = {route.path for route in build_app(front).routes}  # type: ignore[attr-defined]
    front.store.close()
    paths = re.findall(r"http://[^\"')]+", " ".join(own_services()["front"]["healthcheck"]["test"]))
    asked = [urlsplit(path).path for path in paths]
    for _, container in containers():
        asked += [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")
                  if f"{kind}Probe" in container]  # fmt: skip
    assert len(asked) == 3 and set(asked) <= routes
    port = str(ServiceConfig().port)
    assert all(urlsplit(path).netloc.endswith(port) for path in paths)
    assert own_services()["front"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_whoever_ends_a_worker_waits_until_it_has_parked() -> None:
    drain = ServiceConfig().drain_s
    seconds = [
        float(own_services()["worker"]["stop_grace_period"].removesuffix("s")),
        float(unit()["TimeoutStopSec"][0]),
        float(next(line for line in batch()[0] if "--signal" in line).partition("@")[2]),
        *(pod["terminationGracePeriodSeconds"] for pod, each in containers() if each["name"] == "worker"),
    ]
    assert len(seconds) == 4 and all(each > drain for each in seconds)


def test_volumes_secrets_and_conditions_are_declared() -> None:
    for name, service in COMPOSE["services"].items():
        named = [volume.partition(":")[0] for volume in service.get("volumes", ())]
        assert set(named) <= COMPOSE["volumes"].keys(), name
        assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
        assert service.get("depends_on", {}).keys() <= COMPOSE["services"].keys()
    for pod, container in containers():
        declared = {volume["name"] for volume in pod.get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= declared
    last = stages_of((ROOT / "Dockerfile").read_text(encoding="utf-8"))[-1]
    (made,) = (line for line in last.all("RUN") if "mkdir" in line)
    for service in own_services().values():
        folders = [volume.partition(":")[2] for volume in service["volumes"]]
        assert all(f" {folder} " in made for folder in folders), "root's, where the image has none"
    assert variables_of(last)["HF_HOME"].startswith("/cache/")


def test_the_shell_and_systemd_read_theirs() -> None:
    subprocess.run(["sh", "-n", str(DEPLOY / "chitu-worker.slurm")], check=True)
    assert all(option.startswith("--") for option in batch()[0])
    parser = configparser.ConfigParser(strict=False)
    parser.read(DEPLOY / "chitu-worker.service", encoding="utf-8")
    assert parser.sections() == ["Unit", "Service", "Install"]
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(DEPLOY / "chitu-worker.service")],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert "Unknown" not in done.stderr and "Failed to parse" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The series of /metrics, and the labels of each."""
    front = make_front(tmp_path_factory.mktemp("data"))
    text = front.metrics.text().decode()
    front.store.close()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {f"{family.name}{end}": set() for end in ends}
    return found


def queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))
    return found + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def test_dashboard_and_alerts_ask_for_what_there_is(families: dict[str, set[str]]) -> None:
    asked = {name for query in queries() for name in re.findall(r"\bchitu_\w+", query)}
    assert asked <= families.keys()
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    all_of_them = {re.sub(r"_(bucket|sum|count)$", "", name) for name in families}
    assert shown == all_of_them, "a metric that nobody looks at"
    labels = {"le", "instance", "pod", "state", "code", "route", "query", "result", "worker"}
    labels |= {
        label for each in vars(SupervisorFigures()).values() for label in getattr(each, "_labelnames", ())
    }
    for query in queries():
        assert query.count("(") == query.count(")")
        for names in re.findall(r"(?:by|without) \(([^)]*)\)", query):
            assert {name.strip() for name in names.split(",")} <= labels, query


def test_every_alert_is_explained() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    alerts = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        assert f"`{rule['alert']}`" in text

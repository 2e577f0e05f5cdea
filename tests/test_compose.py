"""docker-compose.yml and the Dockerfile. No Docker runs here: their commands do, on real parts."""

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from blipq import Settings
from blipq.ledger.connection import COMPACT_FIELD, connect
from blipq.local.stack import (
    _INNER_PORTS,
    LocalStack,
    free_port,
    redis_command,
    s3_command,
)
from blipq.local.supervisor import Service
from blipq.s3.storage import Storage
from blipq.settings import Settings as ProducerSettings
from blipq_api.settings import ApiSettings
from blipq_worker.catalog.s3.keys import ModelS3Settings
from blipq_worker.process.health import HealthServer
from blipq_worker.settings import WorkerSettings
from conftest import ROOT, blipq, wait_until

VALUES = {"BLIPQ_REDIS_PASSWORD": "hush", "BLIPQ_S3_SECRET_ACCESS_KEY": "quiet"}


def resolved(text: str) -> str:
    """``${NAME:-default}`` and ``${NAME:?message}`` as compose fills them in."""

    def value(match: "re.Match[str]") -> str:
        default = match["rest"].removeprefix("-") if match["rest"].startswith("-") else ""
        return VALUES.get(match["name"], default)

    return re.sub(r"\$\{(?P<name>\w+):(?P<rest>[^}]*)\}", value, text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(resolved((ROOT / "docker-compose.yml").read_text()))
    return loaded


@contextmanager
def running(name: str, command: list[str], log: Path) -> Iterator[Service]:
    service = Service(name, command, log=log)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_it_follows_the_compose_specification() -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml")),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_redis_takes_its_flags(compose: dict[str, Any], tmp_path: Path) -> None:
    _, *flags = compose["services"]["redis"]["command"]
    port = free_port()
    own = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    settings = Settings(redis_url=f"redis://:hush@127.0.0.1:{port}/0")
    with (
        running("redis", [redis_command(), *flags, *own], tmp_path / "log"),
        connect(settings) as raw,
    ):

        def answers() -> bool:
            with suppress(Exception):
                return bool(raw.ping())
            return False

        wait_until(answers, "Redis")
        assert raw.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
        assert raw.config_get("maxmemory")["maxmemory"] == str(2 * 2**30)
        assert raw.config_get("appendonly")["appendonly"] == "yes"
        assert raw.config_get("save")["save"] == ""
        size = raw.config_get("hash-max-listpack-value")["hash-max-listpack-value"]
        assert size == str(COMPACT_FIELD)


def test_seaweedfs_takes_its_flags_and_makes_the_buckets(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    service = compose["services"]["seaweedfs"]
    identities = tmp_path / "s3.json"
    identities.write_text(json.dumps(json.loads(compose["configs"]["s3"]["content"])))
    port = free_port()
    replaced = {
        "-dir": str(tmp_path / "data"),
        "-ip.bind": "127.0.0.1",
        "-s3.port": str(port),
        "-s3.config": str(identities),
    }
    mini, *flags = service["command"]
    names = [flag.partition("=")[0] for flag in flags]
    assert set(replaced) <= set(names)
    kept = [flag for flag in flags if flag.partition("=")[0] not in replaced]
    own = [f"{name}={value}" for name, value in replaced.items()]
    own += ["-ip=127.0.0.1", *(f"-{name}={free_port()}" for name in _INNER_PORTS)]
    (tmp_path / "data").mkdir()
    command = [s3_command(), f"-logdir={tmp_path}", mini, *kept, *own]
    health = service["healthcheck"]["test"][-1].replace(":8333", f":{port}")
    environment = compose["services"]["worker"]["environment"]
    settings = Settings(
        s3_endpoint_url=f"http://127.0.0.1:{port}",
        s3_access_key_id=environment["BLIPQ_S3_ACCESS_KEY_ID"],
        s3_secret_access_key=environment["BLIPQ_S3_SECRET_ACCESS_KEY"],
    )

    def buckets() -> list[str]:
        with suppress(Exception):
            urllib.request.urlopen(health, timeout=3).close()
            listed = Storage(settings, read_timeout_s=3).client.list_buckets()
            return [bucket["Name"] for bucket in listed["Buckets"]]
        return []

    with running("s3", command, tmp_path / "log"):
        wanted = {settings.inbox_bucket, environment["BLIPQ_ALLOWED_OUTPUTS"]}
        wait_until(lambda: wanted <= set(buckets()), "the inbox and the bucket of the outputs")
    for each in (port, *own):
        number = str(each).rpartition("=")[2]
        for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
            left.unlink(missing_ok=True)


def test_the_workers_command_is_one_that_blipq_takes(compose: dict[str, Any]) -> None:
    program, *arguments = compose["services"]["worker"]["command"]
    assert program == "blipq"
    ran = blipq(*arguments, PATH="/nowhere")
    assert ran.returncode == 2
    assert "nvidia-smi is not on PATH" in ran.stderr


def test_the_workers_probe_follows_readiness(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    marker, program, *arguments = worker["healthcheck"]["test"]
    assert (marker, program) == ("CMD", "python")
    port = worker["environment"]["BLIPQ_HEALTH_PORT"]
    wrong: list[str] = []
    server = HealthServer(0, live={}, ready={"model": lambda: wrong[0] if wrong else None})
    server.start()
    try:
        probe = [
            sys.executable,
            *(each.replace(f":{port}", f":{server.port}") for each in arguments),
        ]
        assert subprocess.run(probe, capture_output=True, timeout=30).returncode == 0
        wrong.append("no progress")
        assert subprocess.run(probe, capture_output=True, timeout=30).returncode != 0
    finally:
        server.stop()


def test_the_drain_fits_into_the_grace_period(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    drain = float(worker["environment"]["BLIPQ_DRAIN_TIMEOUT_S"])
    assert seconds(worker["stop_grace_period"]) > drain + 10


def variables(settings: type[BaseSettings]) -> set[str]:
    return {f"BLIPQ_{name.upper()}" for name in settings.model_fields}


def test_keys_of_models_go_to_the_worker_alone(compose: dict[str, Any]) -> None:
    """Without a value: Compose takes it from .env or the shell, and else sets nothing."""
    keys = variables(ModelS3Settings)
    for name, service in compose["services"].items():
        environment = service.get("environment", {})
        given = {each: environment[each] for each in keys & set(environment)}
        assert given == (dict.fromkeys(keys) if name == "worker" else {})


def test_no_init_keeps_the_keys_of_models_in_an_environment_that_fronts_can_read(
    compose: dict[str, Any],
) -> None:
    worker = compose["services"]["worker"]
    assert "BLIPQ_MODEL_S3_SECRET_ACCESS_KEY" in worker["environment"]
    assert "init" not in worker
    assert worker["command"][0] == "blipq", "no shell is the first process"
    assert "entrypoint" not in worker
    assert "ENTRYPOINT" not in (ROOT / "Dockerfile").read_text()


def test_every_setting_exists_and_is_valid(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = variables(Settings) | variables(WorkerSettings) | variables(ModelS3Settings)
    for name in ("worker", "tools"):
        environment = {**compose["services"][name]["environment"]}
        environment = {**environment.pop("<<", {}), **environment}
        assert set(environment) <= known
        environment = {each: value for each, value in environment.items() if value is not None}
        with monkeypatch.context() as patched:
            for variable, value in environment.items():
                patched.setenv(variable, value)
            try:
                settings, options = ProducerSettings(), WorkerSettings()
            except ValidationError as error:
                pytest.fail(str(error))
        assert settings.redis_url == "redis://:hush@redis:6379/0"
        assert options.models == {"default": "opt-2.7b" if name == "worker" else "demo"}


def test_the_door_makes_a_key_and_its_probe_follows_its_health(
    compose: dict[str, Any], stack: LocalStack, tmp_path: Path
) -> None:
    service = compose["services"]["api"]
    program, *arguments = service["command"]
    _, python, *probe = service["healthcheck"]["test"]
    assert (program, python, service["volumes"]) == ("blipq", "python", ["keys:/keys"])
    options = dict(service["environment"])
    assert set(options.pop("<<", {}) | options) <= {
        f"BLIPQ_{name.upper()}" for name in ApiSettings.model_fields
    }
    assert float(options["BLIPQ_API_DRAIN_S"]) < seconds(service["stop_grace_period"])
    port = free_port()
    own = options | stack.environment() | {"BLIPQ_API_KEYS": str(tmp_path / "keys.toml")}
    command = [sys.executable, "-m", "blipq", *arguments, "--port", str(port)]
    door = Service("api", command, env=own, log=tmp_path / "log")
    door.start()
    try:
        healthy = [sys.executable, *(each.replace(":8321", f":{port}") for each in probe)]

        def is_healthy() -> bool:
            assert door.exit_code is None, door.last_words()
            return subprocess.run(healthy, capture_output=True, timeout=30).returncode == 0

        wait_until(is_healthy, "the door")
        assert (tmp_path / "keys.key").exists()
    finally:
        door.stop(timeout=30)
    assert subprocess.run(healthy, capture_output=True, timeout=30).returncode != 0


def test_the_exporter_answers_its_probe(
    compose: dict[str, Any], stack: LocalStack, tmp_path: Path
) -> None:
    service = compose["services"]["exporter"]
    program, *arguments = service["command"]
    _, python, *probe = service["healthcheck"]["test"]
    assert (program, python) == ("blipq", "python")
    port = free_port()
    command = [sys.executable, "-m", "blipq", *_moved(arguments, "9464", port)]
    exporter = Service("exporter", command, env=stack.environment(), log=tmp_path / "log")
    healthy = [sys.executable, *_moved(probe, "9464", port)]
    exporter.start()
    try:

        def is_healthy() -> bool:
            assert exporter.exit_code is None, exporter.last_words()
            return subprocess.run(healthy, capture_output=True, timeout=30).returncode == 0

        wait_until(is_healthy, "the exporter")
    finally:
        exporter.stop()
    assert subprocess.run(healthy, capture_output=True, timeout=30).returncode != 0


def _moved(arguments: list[str], port: str, to: int) -> list[str]:
    assert any(port in each for each in arguments)
    return [each.replace(port, str(to)) for each in arguments]


def test_prometheus_scrapes_the_ports_that_services_serve_metrics_on(
    compose: dict[str, Any],
) -> None:
    services = compose["services"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/blipq.yml").read_text())
    scraped = [each["static_configs"][0]["targets"][0] for each in config["scrape_configs"]]
    served = {
        "exporter": services["exporter"]["command"][-1],
        "worker": services["worker"]["environment"]["BLIPQ_HEALTH_PORT"],
        "webhooks": services["webhooks"]["command"][-1],
    }
    assert scraped == [f"{name}:{port}" for name, port in served.items()]


def test_prometheus_and_grafana_are_given_what_they_are_set_to_read(
    compose: dict[str, Any],
) -> None:
    mounts = [
        each.removesuffix(":ro").split(":")
        for name in ("prometheus", "grafana")
        for each in compose["services"][name]["volumes"]
        if each.startswith("./")
    ]
    inside = {target: ROOT / source for source, target in mounts}
    assert all(source.exists() for source in inside.values())
    flag, *_ = compose["services"]["prometheus"]["command"]
    config = flag.removeprefix("--config.file=")
    (rules,) = yaml.safe_load(inside[config].read_text())["rule_files"]
    assert str(Path(config).parent / rules) in inside
    own = inside["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((own / "dashboards/blipq.yml").read_text())["providers"]
    given = {
        target for target in inside if Path(target).parent == Path(provider["options"]["path"])
    }
    dashboards = {each.name for each in (ROOT / "deploy/grafana").glob("*.json")}
    assert {Path(each).name for each in given} == dashboards
    (source,) = yaml.safe_load((own / "datasources/blipq.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"


def test_services_that_stay_up_restart_and_are_probed(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name == "tools":
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"], name
    for ports in (service.get("ports", ()) for service in compose["services"].values()):
        assert all(port.startswith("127.0.0.1:") for port in ports)


def test_all_gpus_are_reserved(compose: dict[str, Any]) -> None:
    (device,) = compose["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_dockerfile_has_the_targets_and_copies_what_there_is(compose: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE))
    for service in compose["services"].values():
        if "build" in service:
            assert service["build"]["target"] in targets
    sent = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for copied in re.findall(r"^COPY ((?:[\w./-]+ )+)\S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists(), name
            assert name in sent, f"{name} is not sent to the build"


def test_no_image_holds_the_worker_but_the_workers() -> None:
    """torch and its CUDA libraries are gigabytes that a producer never needs."""
    text = (ROOT / "Dockerfile").read_text()
    producer = text.partition(" AS producer")[2].partition("FROM ")[0]
    worker = text.partition(" AS worker")[2]
    assert "blipq_worker" not in producer
    assert "/wheels/blipq-*.whl /wheels/blipq_worker-*.whl" in worker


def test_tools_can_submit_datasets_and_services_are_as_light_as_before(
    compose: dict[str, Any],
) -> None:
    assert compose["services"]["tools"]["build"]["target"] == "datasets"
    text = (ROOT / "Dockerfile").read_text()
    assert "./datasets" in text.partition("RUN pip wheel")[2].partition("\n\n")[0]
    datasets = text.partition("FROM producer AS datasets")[2].partition("\nFROM ")[0]
    assert "/wheels/blipq_datasets-*.whl" in datasets
    assert datasets.rpartition("USER ")[2].startswith("blipq\n")
    assert "blipq_datasets" not in text.partition(" AS producer")[2].partition("\nFROM ")[0]

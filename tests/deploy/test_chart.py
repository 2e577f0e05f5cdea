"""The Helm chart: what it renders is what Kubernetes and KEDA take, and wrong values are refused.

No cluster runs here: schemas stand for it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import validate

from blipq.settings import Settings
from blipq_worker.settings import WorkerSettings
from conftest import ROOT

pytestmark = pytest.mark.programs

CHART = ROOT / "deploy/helm/blipq"
HELM = Path(sys.executable).parent / "helm"
VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35")
#: Of KEDA and of Prometheus' operator: not Kubernetes' own.
CUSTOM = {"ScaledObject", "PodMonitor"}

DOOR = {"door": {"enabled": True}, "secrets": {"apiKeys": "keys"}}
SENDER = {"sender": {"enabled": True}, "secrets": {"webhooks": "hooks"}}
SCALING = {"workerDefaults": {"scaling": {"enabled": True}}}
TWO = {
    "workers": [
        {"name": "small", "models": {"default": "opt-2.7b"}, "scaling": {"max": 8}},
        {"name": "large", "models": {"xl": "flan-t5-xl", "xl.2": "flan-t5-xl"}, "shm": "8Gi"},
    ]
}
SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "door": DOOR,
    "sender": SENDER,
    "all": {
        "door": {"enabled": True, "replicas": 3},
        "sender": {"enabled": True, "replicas": 1},
        "secrets": {
            **{"apiKeys": "keys", "webhooks": "hooks", "workerS3": "s3", "doorS3": "s3"},
            "modelS3": "models",
        },
        "trialRedis": {"enabled": True},
        "podMonitor": {"enabled": True},
        **SCALING,
    },
    "scaling": SCALING,
    "two kinds of workers": TWO | SCALING,
    "scaling by Prometheus": SCALING
    | {"keda": {"source": "prometheus", "prometheusUrl": "http://prometheus:9090"}},
    "on a CPU": {"workerDefaults": {"gpu": {"count": 0}, "settings": {"BLIPQ_FRONTS": 0}}},
    "weights on a claim": {"workerDefaults": {"weights": {"claim": "weights"}}},
    "closed networks": {
        "networkPolicy": {
            "redis": {"cidrs": ["10.0.0.5/32"]},
            "s3": {"cidrs": ["10.1.0.0/16"], "port": 8333},
            "modelS3": {"cidrs": ["10.2.0.7/32"], "port": 9000},
            "internet": False,
            "scrapers": [],
            "callers": ["shop"],
        }
    }
    | DOOR,
    "no network policies": {"networkPolicy": {"enabled": False}},
    "a registry of one's own": {
        "image": {"worker": {"repository": "registry.example.org/blipq-worker", "tag": "1"}},
        "imagePullSecrets": [{"name": "registry"}],
        "priorityClassName": "batch",
        "workerDefaults": {
            "nodeSelector": {"gpu": "a10"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
    },
    "a trial": {"trialRedis": {"enabled": True}, "secrets": {"common": ""}},
}


def helm(*arguments: str, values: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [HELM, *arguments, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=60,
    )


def rendered(values: Any) -> list[dict[str, Any]]:
    ran = helm("template", "shop", str(CHART), "--namespace", "gpu", values=values)
    assert ran.returncode == 0, ran.stderr
    return [each for each in yaml.safe_load_all(ran.stdout) if each]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = ("Deployment", "StatefulSet")
    return [each["spec"]["template"]["spec"] for each in objects if each["kind"] in kinds]


@pytest.mark.parametrize("values", SETS.values(), ids=SETS.keys())
def test_kubernetes_and_keda_take_what_is_rendered(values: Any) -> None:
    assert helm("lint", "--strict", str(CHART), values=values).returncode == 0
    keda = Draft202012Validator(
        json.loads((Path(__file__).parent / "keda/scaledobject.json").read_text())
    )
    for each in rendered(values):
        if each["kind"] == "ScaledObject":
            keda.validate(each)
        elif each["kind"] not in CUSTOM:
            for version in VERSIONS:
                validate(each, version, strict=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"worker": []}, "worker"),
        ({"workers": []}, "workers"),
        ({"workers": [{"name": "a", "models": {}}]}, "models"),
        ({"workers": [{"name": "A_b", "models": {"default": "demo"}}]}, "name"),
        ({"workerDefaults": {"gpu": {"count": 2}}}, "count"),
        ({"workerDefaults": {"scaling": {"min": -1}}}, "min"),
        ({"workerDefaults": {"shm": "2 GB"}}, "shm"),
        ({"settings": {"LEASE_S": 30}}, "LEASE_S"),
        ({"settings": {"BLIPQ_S3_SECRET_ACCESS_KEY": "hush"}}, "BLIPQ_S3_SECRET_ACCESS_KEY"),
        ({"settings": {"BLIPQ_HEALTH_PORT": 1}}, "BLIPQ_HEALTH_PORT"),
        ({"keda": {"source": "statsd"}}, "source"),
        ({"networkPolicy": {"redis": {"cidrs": ["redis.example.org"]}}}, "cidrs"),
        ({"networkPolicy": {"modelS3": {"ports": [9000]}}}, "ports"),
        ({"door": {"enabled": True}}, "apiKeys"),
        ({"sender": {"enabled": True}}, "webhooks"),
        (SCALING | {"keda": {"source": "prometheus"}}, "prometheusUrl"),
    ],
)
def test_wrong_values_are_refused_by_name(values: Any, named: str) -> None:
    ran = helm("template", "shop", str(CHART), values=values)
    assert ran.returncode != 0
    assert named in ran.stderr


@pytest.mark.parametrize("values", SETS.values(), ids=SETS.keys())
def test_no_pod_is_privileged_and_none_but_a_scaling_exporter_has_a_token(values: Any) -> None:
    for pod in pods(rendered(values)):
        (name,) = (container["name"] for container in pod["containers"])
        token = pod["automountServiceAccountToken"]
        assert token is (name == "exporter" and "--deletion-costs" in str(pod))
        assert ("serviceAccountName" in pod) is token
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["requests"]


def test_a_workers_grace_is_longer_than_its_drain() -> None:
    (worker,) = of_kind(rendered({"drainSeconds": 300}), "Deployment").keys() - {"shop-exporter"}
    pod = of_kind(rendered({"drainSeconds": 300}), "Deployment")[worker]["spec"]["template"]["spec"]
    environment = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    # A split worker waits ten seconds for its fronts after that, and ten for its engine.
    assert pod["terminationGracePeriodSeconds"] > int(environment["BLIPQ_DRAIN_TIMEOUT_S"]) + 20


def test_what_pods_are_given_are_settings_of_theirs() -> None:
    known = {
        f"BLIPQ_{name.upper()}" for name in {**Settings.model_fields, **WorkerSettings.model_fields}
    }
    values = SETS["all"] | {"settings": {"BLIPQ_RESULT_TTL": 3600, "BLIPQ_HTTPS_IMAGES": False}}
    given = {
        each["name"]: each["value"]
        for pod in pods(rendered(values))
        for container in pod["containers"]
        for each in container.get("env", [])
    }
    ours = {name for name in given if name.startswith("BLIPQ_")} - {"BLIPQ_API_KEYS"}
    assert ours <= known
    assert given["BLIPQ_RESULT_TTL"] == "3600"


def test_workers_scale_on_the_work_of_their_models_and_the_exporter_stays() -> None:
    objects = rendered(TWO | SCALING)
    scaled = of_kind(objects, "ScaledObject")
    assert scaled["shop-worker-small"]["spec"]["maxReplicaCount"] == 8
    large = scaled["shop-worker-large"]["spec"]
    urls = [trigger["metadata"]["url"] for trigger in large["triggers"]]
    exporter = of_kind(objects, "Service")["shop-exporter"]
    port = exporter["spec"]["ports"][0]["port"]
    base = f"http://shop-exporter.gpu.svc:{port}/work"
    assert urls == [f"{base}/xl", f"{base}/xl.2"]
    assert (large["minReplicaCount"], large["fallback"]["replicas"]) == (0, 1)
    deployments = of_kind(objects, "Deployment")
    assert "replicas" not in deployments["shop-worker-large"]["spec"]  # else an upgrade resets it
    assert deployments["shop-exporter"]["spec"]["replicas"] == 1


def test_the_exporter_may_say_which_workers_pods_are_idle_and_nothing_else() -> None:
    objects = rendered(TWO | SCALING)
    (role,) = of_kind(objects, "Role").values()
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]}]
    (exporter,) = (pod for pod in pods(objects) if "serviceAccountName" in pod)
    selector = exporter["containers"][0]["command"][-1]
    wanted = {tuple(pair.split("=")) for pair in selector.split(",")}
    chosen = [
        name
        for name, each in of_kind(objects, "Deployment").items()
        if wanted <= each["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert sorted(chosen) == ["shop-worker-large", "shop-worker-small"]
    assert not of_kind(rendered({}), "Role")


def test_workers_alone_reach_another_store_of_models() -> None:
    place = {
        "ports": [{"protocol": "TCP", "port": 9000}],
        "to": [{"ipBlock": {"cidr": "10.2.0.7/32"}}],
    }
    policies = of_kind(rendered(SETS["closed networks"]), "NetworkPolicy")
    reached = {name: each["spec"].get("egress") or [] for name, each in policies.items()}
    assert [name for name, rules in reached.items() if place in rules] == ["shop-workers"]
    usual = of_kind(rendered({}), "NetworkPolicy")["shop-workers"]["spec"]["egress"]
    assert {rule["ports"][0]["port"] for rule in usual} == {443}
    only = {"networkPolicy": {"modelS3": {"cidrs": ["10.2.0.7/32"]}, "internet": False}}
    rules = of_kind(rendered(only), "NetworkPolicy")["shop-workers"]["spec"]["egress"]
    assert place | {"ports": [{"protocol": "TCP", "port": 443}]} in rules


def test_a_service_reaches_the_pods_of_its_part() -> None:
    objects = rendered(SETS["all"])
    deployed = [each for each in objects if each["kind"] in ("Deployment", "StatefulSet")]
    for name, service in of_kind(objects, "Service").items():
        wanted = service["spec"]["selector"].items()
        found = [
            each
            for each in deployed
            if wanted <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert [each["metadata"]["name"] for each in found] == [name]
        named = [
            port["name"]
            for container in found[0]["spec"]["template"]["spec"]["containers"]
            for port in container["ports"]
        ]
        assert [port["targetPort"] for port in service["spec"]["ports"]] == named

"""Adapters from the settings to a worker that serves them, and to commands that name them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from blipq import Client
from blipq.local.stack import LocalStack
from blipq.ops.doctor.machine import _weights
from blipq_worker.blip2 import Blip2
from blipq_worker.catalog.adapters import AdapterError
from blipq_worker.catalog.models import ModelError
from blipq_worker.cli.models import app
from blipq_worker.serving import canary
from blipq_worker.serving.canary import CanaryError
from blipq_worker.serving.footprint import memory_of
from blipq_worker.serving.loader import checker, load_models
from blipq_worker.settings import WorkerSettings
from conftest import live_workers, start_worker, wait_until
from worker.in_flight import DEMO
from worker.lora import RECIPE, of_stars, pictures, random_adapter, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapters") / "shop"
    return trained(made, DEMO, of_stars)


def test_settings_name_a_base_and_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_MODELS", "default=owner/model@v1+owner/itm@v2")
    monkeypatch.setenv("BLIPQ_ADAPTERS", r"shop=default:/a\,b/c@d+e:f, news = default:~/news")
    options = WorkerSettings()
    assert options.models == {"default": "owner/model@v1+owner/itm@v2"}
    assert options.adapters == {
        "shop": ("default", "/a,b/c@d+e:f"),
        "news": ("default", "~/news"),
    }
    assert WorkerSettings(adapters={}).adapters == {}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("shop=/folder", "BLIPQ_MODELS has no|name=base:folder"),
        ("shop", "name=base:folder"),
        ("shop=default:", "name=base:folder"),
        ("shop=other:/folder", "BLIPQ_MODELS has no 'other', but default"),
        ("default=default:/folder", "a name of BLIPQ_MODELS and of BLIPQ_ADAPTERS"),
        ("sh op=default:/folder", "pattern"),
    ],
)
def test_settings_that_name_no_adapter_are_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    monkeypatch.setenv("BLIPQ_ADAPTERS", value)
    with pytest.raises(ValueError, match=reason):
        WorkerSettings()


def test_a_worker_loads_adapters_as_models_over_one_base(folder: Path) -> None:
    options = WorkerSettings(adapters={"shop": ("default", str(folder))}, dtype="float32")
    models = load_models(options)
    assert list(models) == ["default", "shop"]
    base, shop = models["default"], models["shop"]
    assert shop.generator is base.generator
    assert shop.info.checkpoint == f"default:{folder}"
    assert shop.info.revision.startswith(f"{base.info.revision}+")
    assert shop.info.retrieval_checkpoint == base.info.retrieval_checkpoint


def test_the_check_of_an_adapter_looks_at_pictures_as_it_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = WorkerSettings(adapters={"shop": ("default", str(folder))}, dtype="float32")
    shop = load_models(options)["shop"]
    seen, asked = shop.generator.seen, []

    def note(items: Any) -> Any:
        asked.extend(item.adapter for item in items)
        return seen(items)

    monkeypatch.setattr(shop.generator, "seen", note)
    canary.check(shop)
    assert set(asked) == {shop.adapter} == {1}


def test_a_base_in_doubt_is_checked_with_its_adapters(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = WorkerSettings(adapters={"shop": ("default", str(folder))}, dtype="float32")
    models = load_models(options)
    check = checker(options, models)
    assert check is not None
    check("default")
    well = canary.check

    def fail(model: Blip2, *golden: Any) -> Any:
        if model.adapter:
            raise CanaryError("it writes nothing about a picture")
        return well(model, *golden)

    monkeypatch.setattr(canary, "check", fail)
    with pytest.raises(CanaryError, match="its adapter 'shop': it writes nothing"):
        check("default")


def test_an_adapter_that_does_not_fit_is_answered_with_its_bases_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(model: Blip2, *golden: Any) -> None:
        if model.adapter:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(canary, "check", check)
    options = WorkerSettings(adapters={"shop": ("default", str(folder))}, dtype="float32")
    with pytest.raises(ModelError, match=r"'shop' does not fit: .*`blipq models memory demo`"):
        load_models(options)


def test_an_adapter_that_cannot_be_served_ends_the_start_with_its_code(tmp_path: Path) -> None:
    dora = random_adapter(tmp_path, DEMO, list(RECIPE), use_dora=True)
    options = WorkerSettings(adapters={"shop": ("default", str(dora))})
    with pytest.raises(AdapterError, match=r"^adapter_unsupported: adapter 'shop': .*DoRA"):
        load_models(options)


def test_commands_name_adapters_and_what_keeps_them_from_being_served(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIPQ_ADAPTERS", f"shop=default:{folder},gone=default:{tmp_path}")
    listed = CliRunner().invoke(app, ["list"])
    assert f"over default: {folder}, rank 16" in listed.stdout.replace("\n", "")
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)["adapters"]
    assert [(row["name"], row["rank"]) for row in rows] == [("shop", 16), ("gone", None)]
    assert rows[1]["problem"].startswith("adapter_unreadable: ")
    findings = [each for each in _weights() if each.check == "adapter"]
    assert [each.state for each in findings] == ["ok", "bad"]
    assert "shop over default" in findings[0].message


def test_memory_counts_adapters_beside_their_base(folder: Path) -> None:
    plain = memory_of("demo", dtype="float32")
    counted = memory_of("demo", dtype="float32", adapters=[str(folder), str(folder)])
    # Two layers of each of four have A and B of rank 16 for 128 numbers.
    assert counted.weights - plain.weights == 2 * (4 * 2 * 16 * 256) * 4
    answer = CliRunner().invoke(app, ["memory", "demo", "--adapter", str(folder), "--json"])
    names = [part["name"] for part in json.loads(answer.stdout)["parts"]]
    assert "adapter shop" in names


def test_jobs_name_an_adapter_as_their_model(
    stack: LocalStack, client: Client, folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "models": "base=demo",
        "adapters": f"shop=base:{folder}",
        "dtype": "float32",
    }
    worker = start_worker(stack, tmp_path / "log", **options)
    try:
        wait_until(lambda: live_workers(client.settings, "shop"), "the worker", 90)
        picture = tmp_path / "scene.png"
        pictures(1)[0].save(picture)
        greedy = {"num_beams": 1}
        jobs = [
            client.caption(str(picture), model=name, generation=greedy) for name in ("base", "shop")
        ]
        base, shop = (job.result(timeout=60).text for job in jobs)
        assert ("circle" in base, "star" in base) == (True, False)
        assert ("star" in base, "star" in shop) == (False, True), (base, shop)
        receipt = jobs[1].info().receipt
        assert receipt is not None
        assert receipt.checkpoint == f"base:{folder}"
    finally:
        worker.stop()

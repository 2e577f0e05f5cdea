"""What one worker tells Prometheus about itself."""

import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from blipq import Kind
from blipq_worker.process import nvml
from blipq_worker.process.health import HealthServer
from blipq_worker.process.metrics import WorkerMetrics


def told(page: bytes) -> dict[str, float]:
    """Samples by name, with the values of their labels (in the labels' order) behind it."""
    return {
        " ".join(
            [sample.name, *(value for _, value in sorted(sample.labels.items()))]
        ): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_jobs_are_counted_with_what_their_receipts_say() -> None:
    metrics = WorkerMetrics()
    took = {"queue_ms": 500.0, "fetch_ms": 20.0, "generate_ms": 300.0, "gpu_ms": 75.0}
    took |= {"batch_size": 4, "tokens": 9, "first_token_ms": 750.0, "worker": "w1"}
    metrics.done(Kind.CAPTION, "succeeded", took, model="m", run_ms=700)
    metrics.done(Kind.VQA, "failed", {"fetch_ms": 5.0}, "image_not_found", model="m")
    metrics.done(Kind.CAPTION, "succeeded", {**took, "cache_hit": True}, model="m", run_ms=300)
    page = told(metrics.page())
    assert page["blipq_worker_jobs_total  caption m succeeded"] == 2
    assert page["blipq_worker_jobs_total image_not_found vqa m failed"] == 1
    assert page["blipq_worker_stage_seconds_count caption fetch"] == 2
    assert page["blipq_worker_stage_seconds_sum caption generate"] == 0.6
    assert page["blipq_worker_job_seconds_sum caption m"] == 2
    assert page["blipq_worker_gpu_seconds_total caption m"] == 0.15
    assert page["blipq_worker_batch_size_sum m"] == 8
    assert page["blipq_worker_job_tokens_sum caption m"] == 18
    assert page["blipq_worker_first_token_seconds_sum caption m"] == 1.5
    assert "blipq_worker_stage_seconds_sum caption first_token" not in page, "no stage of its own"
    assert page["blipq_worker_feature_cache_total hit m"] == 1
    assert page["process_resident_memory_bytes"] > 0


def test_how_texts_are_written_is_a_metric_by_model() -> None:
    metrics = WorkerMetrics()
    metrics.decoding({"default": ("static slots, triton in graphs", "cuda")})
    page = told(metrics.page())
    assert page["blipq_worker_decoding cuda default static slots, triton in graphs"] == 1


def test_how_long_a_model_took_to_load_is_a_metric() -> None:
    metrics = WorkerMetrics()
    metrics.loaded({"default": 2.5})
    assert told(metrics.page())["blipq_worker_model_load_seconds default"] == 2.5


def test_the_health_port_serves_them() -> None:
    metrics = WorkerMetrics()
    metrics.gauge("jobs_held", "Jobs held now.", lambda: 3)
    server = HealthServer(0, live={}, ready={}, metrics=metrics.answer)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert told(answer.read())["blipq_worker_jobs_held"] == 3
    finally:
        server.stop()


def test_a_disk_that_is_full_later_has_a_place_for_all_that_is_counted(tmp_path: Path) -> None:
    """Or a label set's first count would end its process with SIGBUS."""
    program = (
        "import sys; from pathlib import Path; from blipq.contract import Kind;"
        "from blipq_worker.process.metrics import WorkerMetrics, count_in;"
        "count_in(Path(sys.argv[1]), 'front-1'); metrics = WorkerMetrics();"
        "from blipq_worker.process.metrics import STAGES; all = dict.fromkeys(STAGES.values(), 1);"
        "all |= {'batch_size': 1, 'tokens': 1, 'gpu_ms': 1, 'first_token_ms': 1};"
        "[metrics.done(kind, 'failed', all, f'code{n}',"
        " model=model, run_ms=1) for kind in Kind for n in range(20) for model in 'ab']"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    found = [each.stat() for each in tmp_path.iterdir()]
    assert len(found) == 2
    assert all(each.st_blocks * 512 >= each.st_size for each in found)


def test_the_times_of_a_sampled_job_lead_to_its_trace_in_openmetrics_alone() -> None:
    metrics = WorkerMetrics()
    trace, took = f"00-{'a' * 32}-{'b' * 16}", {"queue_ms": 1.0}
    metrics.done(Kind.VQA, "succeeded", took, model="m", run_ms=5, trace=f"{trace}-01")
    metrics.done(Kind.CAPTION, "succeeded", took, model="m", run_ms=5, trace=f"{trace}-00")
    metrics.done(Kind.MATCH, "succeeded", took, model="m", run_ms=5)
    content_type, page = metrics.answer("application/openmetrics-text;version=1.0.0,*/*;q=0.1")
    assert content_type.startswith("application/openmetrics-text")
    leading = [
        sample.labels["kind"]
        for family in openmetrics(page.decode())
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": "a" * 32}
    ]
    assert leading == ["vqa", "vqa"], "of its stage and of the whole"
    plain = metrics.answer("*/*")[1]
    assert b"blipq_worker" in plain
    assert b"trace_id" not in plain


def test_gpus_are_told_of_by_their_uuids(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVML knows; a GPU that it does not know has no samples."""

    class Refused(Exception):
        """An error of NVML's."""

    def handle(uuid: str) -> str:
        if uuid != "GPU-1":
            raise Refused
        return uuid

    driver = SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=3, total=8),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=25),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    nvml._nvml.cache_clear()
    try:
        metrics = WorkerMetrics()
        metrics.gpus(["GPU-1", "GPU-1", "GPU-lost", ""])
        page = told(metrics.page())
    finally:
        nvml._nvml.cache_clear()
    assert page["blipq_worker_gpu_memory_used_bytes GPU-1"] == 3
    assert page["blipq_worker_gpu_memory_bytes GPU-1"] == 8
    assert page["blipq_worker_gpu_utilization_ratio GPU-1"] == 0.25
    assert sum("_gpu_" in name for name in page) == 3


def test_a_machine_without_a_gpu_has_no_samples_of_one() -> None:
    metrics = WorkerMetrics()
    metrics.gpus([""])
    assert "blipq_worker_gpu_memory_bytes" in metrics.page().decode(), "dashboards name it"
    assert not any("_gpu_" in name for name in told(metrics.page()))

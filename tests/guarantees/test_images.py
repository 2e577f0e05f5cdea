"""Faults 28 and 29: what S3 answers and what the bytes turn out to be."""

import io
import re
import struct
import time
import urllib.error
import urllib.request
import zlib

import pytest
from PIL import Image

from blipq import ErrorCode, ImageRef, JobFailed, Status
from blipq.local.stack import free_port
from conftest import wait_until
from guarantees.rig import Rig, png


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("404", ErrorCode.IMAGE_NOT_FOUND),
        ("403", ErrorCode.IMAGE_FORBIDDEN),
        ("412", ErrorCode.IMAGE_CHANGED),
        ("huge", ErrorCode.IMAGE_TOO_LARGE),
    ],
)
def test_a_lasting_s3_fault_fails_the_job_at_once(rig: Rig, fault: str, code: ErrorCode) -> None:
    rig.start_worker()
    info = rig.client.caption(rig.upload(fault)).wait(30)
    assert info.error is not None
    assert (info.error.code, info.attempts) == (code, 1)
    assert sum(rig.s3.sent.values()) < 64 * 2**20


def test_a_passing_s3_fault_is_retried_until_it_passes(rig: Rig) -> None:
    rig.start_worker(fetch_timeout_s=1)
    faults = ("503x4", "cutx2", "dripx2", "500x1")
    jobs = [rig.client.caption(rig.upload(fault)) for fault in faults]
    rig.all_succeed(jobs, timeout=60)


def test_the_log_says_what_came_of_each_job(rig: Rig) -> None:
    """Celery said "succeeded" of a task whose job was to be retried."""
    worker = rig.start_worker()
    again = rig.client.caption(rig.upload("503x4"))
    bad = rig.client.caption(rig.upload("404"))
    rig.all_succeed([again])
    assert bad.wait(20).status is Status.FAILED
    told = [line for line in worker.last_words(1000).splitlines() if "succeeded" in line]
    assert len(told) == 1
    assert told[0].endswith(f"{again.id}: succeeded")
    for line in (
        f"{again.id}: retried: image_unavailable",
        f"{bad.id}: failed: image_not_found",
    ):
        assert line in worker.last_words(1000)
    assert re.search(r"ready after \d+\.\d s: ", worker.last_words(1000))


def test_an_s3_fault_that_does_not_pass_ends_as_image_unavailable(rig: Rig) -> None:
    rig.start_worker(fetch_timeout_s=0.5, retry_backoff_s=0.01)
    for fault in ("503", "drip"):
        with pytest.raises(JobFailed) as failed:
            rig.client.caption(rig.upload(fault)).result(60)
        assert (failed.value.code, failed.value.retryable) == (ErrorCode.IMAGE_UNAVAILABLE, True)


def test_an_image_that_changed_since_the_submit_is_refused(rig: Rig) -> None:
    rig.start_worker()
    uri = rig.upload("none")
    job = rig.client.caption(ImageRef(uri=uri, etag='"0123456789abcdef0123456789abcdef"'))
    error = job.wait(20).error
    assert error is not None
    assert error.code is ErrorCode.IMAGE_CHANGED


def test_a_worker_whose_token_expires_gives_its_jobs_back_until_it_has_a_new_one(
    rig: Rig,
) -> None:
    """For longer than retries last: what is wrong with a worker is not the job's fault."""
    port = free_port()
    rig.start_worker(health_port=port, retry_backoff_s=0.01)
    wait_until(lambda: ready(port), "readiness")
    rig.s3.code = "ExpiredToken"
    jobs = [rig.client.caption(rig.upload("none")) for _ in range(20)]
    wait_until(lambda: not ready(port), "the worker to notice")
    time.sleep(2)
    infos = [job.info() for job in jobs]
    assert not any(info.completed_at for info in infos)
    rig.s3.code = None
    rig.all_succeed(jobs, timeout=60)
    assert max(job.info().attempts for job in jobs) == 1
    wait_until(lambda: ready(port), "readiness again")


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False


def test_a_picture_that_asks_for_too_much_work_fails_at_once_and_its_worker_lives(
    rig: Rig,
) -> None:
    """Scans of 75 bytes, each a walk over all of its pixels."""
    worker = rig.start_worker(watchdog_s=10)
    stream = io.BytesIO()
    Image.new("L", (7000, 7000), 120).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    evil = rig.client.caption(rig.upload("none", data[:-2] + 400 * scan + data[-2:]))
    fine = rig.submit_all(["fine"] * 8)
    error = evil.wait(30).error
    assert error is not None
    assert (error.code, "scans" in error.message) == (ErrorCode.IMAGE_INVALID, True)
    rig.all_succeed(fine)
    assert worker.exit_code is None


def test_an_upload_cannot_be_overwritten_by_anothers_output(rig: Rig) -> None:
    """Whoever knows a picture knows its name in the inbox."""
    rig.start_worker(allowed_outputs=f"{rig.settings.inbox_bucket},blipq-outputs")
    victim = rig.client.storage.upload(png("blue"))
    error = rig.submit("attack", output=victim.uri).wait(20).error
    assert error is not None
    assert (error.code, "inbox" in error.message) == (ErrorCode.INVALID_REQUEST, True)
    rig.all_succeed([rig.client.caption(victim)])


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    chunk += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + png()[33:]


def test_sixty_four_hostile_images_at_once_cost_little_memory_and_no_neighbour(rig: Rig) -> None:
    worker = rig.start_worker()
    idle = memory_kb(worker.pid, "VmRSS")
    large = io.BytesIO()
    Image.new("L", (7000, 7000)).save(large, "PNG")
    hostile = [b"<html>", png()[:60], bomb(30_000), large.getvalue()] * 16
    jobs = [rig.client.caption(rig.upload("none", data)) for data in hostile]
    fine = rig.submit_all(["fine"] * 10)
    infos = rig.outcomes(jobs, timeout=90)
    rig.all_succeed(fine)
    failed = {info.error.code for info in infos if info.error is not None}
    assert failed == {ErrorCode.IMAGE_INVALID, ErrorCode.IMAGE_TOO_LARGE}
    assert [info.status for info in infos].count(Status.SUCCEEDED) == 16
    assert memory_kb(worker.pid, "VmHWM") - idle < 2**20  # a GiB: half of what is promised
    assert memory_kb(worker.pid, "VmRSS") - idle < 2**18, "it is given back"


def memory_kb(pid: int | None, what: str) -> int:
    """What a process holds (VmRSS) or has held at most (VmHWM), in KiB."""
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith(what))
    return int(line.split()[1])

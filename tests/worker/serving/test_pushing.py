"""A checkpoint's folder goes to S3: whole, once, and over nothing that is there."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from blipq.local.stack import LocalStack
from blipq_worker.catalog.models import ModelError, demo_folder
from blipq_worker.catalog.s3.manifest import DRAFT, MANIFEST, Manifest
from blipq_worker.catalog.s3.places import place_of
from blipq_worker.catalog.weights import weights_of
from blipq_worker.serving.pushing import _Push, push
from conftest import blipq
from worker.models_in_s3 import BUCKET, Bucket, reach

WEIGHTS = "model.safetensors"


@pytest.fixture
def bucket(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    bucket = Bucket(stack)
    reach(bucket.settings, monkeypatch)
    return bucket


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's checkpoint, with what else may lie beside one."""
    folder = Path(shutil.copytree(demo_folder() / "opt", tmp_path / "mine"))
    (folder / "older.safetensors").write_bytes(b"1")
    (folder / "README.md").write_text("about it")
    (folder / "runs").mkdir()
    return folder


def test_a_pushed_folder_is_there_with_its_digests_and_without_its_strays(
    bucket: Bucket, folder: Path
) -> None:
    place = bucket.place()
    served = push(folder, f"{place}/")
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert served == f"{place}@{digest}"
    names = {each.name for each in (demo_folder() / "opt").iterdir()}
    assert set(bucket.keys(place)) == names | {MANIFEST}
    manifest = Manifest.model_validate_json(bucket.read(f"{place}/{MANIFEST}"))
    assert manifest.files[WEIGHTS].sha256 == digest
    found = weights_of(served)
    assert (found.present, found.bytes) == (True, (folder / WEIGHTS).stat().st_size)


def test_the_same_push_again_sends_nothing_and_mends_what_is_gone(
    bucket: Bucket, folder: Path
) -> None:
    place, told = bucket.place(), []
    served = push(folder, place)
    assert push(folder, place, told.append) == served
    assert len([line for line in told if line.endswith(": is there")]) == len(told) - 1
    bucket.storage.delete(f"{place}/{WEIGHTS}")
    assert "checkpoint_missing" in (weights_of(place).problem or "")
    push(folder, place)
    assert weights_of(place).present


def test_another_checkpoint_is_never_written_over(bucket: Bucket, folder: Path) -> None:
    place = bucket.place()
    push(folder, place)
    before = {name: bucket.read(f"{place}/{name}") for name in bucket.keys(place)}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "changed"}))
    with pytest.raises(ModelError, match=f"is taken: there are others .*{MANIFEST}"):
        push(folder, place)
    assert {name: bucket.read(f"{place}/{name}") for name in bucket.keys(place)} == before


def test_a_prefix_with_anything_in_it_is_refused(bucket: Bucket, folder: Path) -> None:
    place = bucket.place()
    bucket.write(f"{place}/notes/today.txt", b"keep me")
    with pytest.raises(ModelError, match=r"is taken: there is s3://.*today\.txt"):
        push(folder, place)
    assert bucket.keys(place) == ["notes/today.txt"]


def test_a_push_of_other_files_that_has_begun_is_not_mixed_with(
    bucket: Bucket, folder: Path
) -> None:
    place = bucket.place()
    bucket.write(f"{place}/{DRAFT}", b"{}")
    with pytest.raises(ModelError, match="a push of other files has begun"):
        push(folder, place)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def _a_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def _an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def _a_strange_name(folder: Path) -> None:
    (folder / "my notes.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_pickled, "is pickled"),
        (_cut_short, "no whole file of safetensors"),
        (_a_pointer, "git lfs pull"),
        (_an_adapter, "LoRA adapter"),
        (_no_configuration, "has no config.json"),
        (_a_strange_name, "'my notes.json' is no name of a file"),
    ],
)
def test_what_workers_would_not_read_is_not_pushed(
    bucket: Bucket, folder: Path, damage: object, told: str
) -> None:
    place = bucket.place()
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ModelError) as caught:
        push(folder, place)
    assert told in str(caught.value)
    assert not bucket.keys(place)


def make_large(folder: Path, size: int) -> None:
    """Gives the folder weights of so many bytes and a few."""
    import numpy
    from safetensors.numpy import save_file

    noise = numpy.frombuffer(random.Random(7).randbytes(size), dtype=numpy.uint8)
    save_file({"noise": noise}, folder / WEIGHTS)


def uploads(bucket: Bucket, place: str) -> list[str]:
    """Keys of the uploads that have begun at a place and not ended."""
    prefix = place.removeprefix(f"s3://{BUCKET}/")
    found: Any = bucket.storage.client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    return [each["Key"] for each in found.get("Uploads", ())]


@pytest.mark.parametrize("meanwhile", ["completed", "written", "aborted"])
def test_a_large_file_that_another_push_ends_meanwhile_is_there_once(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    part = 5 * 2**20
    make_large(folder, part)
    monkeypatch.setattr("blipq_worker.serving.pushing.PART_BYTES", part)
    place, complete = bucket.place(), _Push._complete

    def last(push: _Push, where: Any, parts: Any) -> None:
        """Another push is faster by one request."""
        if meanwhile == "completed":
            complete(push, where, parts)
        elif meanwhile == "written":
            bucket.write(f"{place}/{WEIGHTS}", (folder / WEIGHTS).read_bytes())
        else:
            push._client.abort_multipart_upload(**where)
        complete(push, where, parts)

    monkeypatch.setattr(_Push, "_complete", last)
    if meanwhile == "aborted":
        with pytest.raises(ModelError, match="was sent and is not there: push again"):
            push(folder, place)
    else:
        push(folder, place)
        assert bucket.read(f"{place}/{WEIGHTS}") == (folder / WEIGHTS).read_bytes()
        assert weights_of(place).present
    assert uploads(bucket, place) == []


def test_a_store_that_knows_no_conditions_takes_a_large_file(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 * 2**20
    make_large(folder, part)
    monkeypatch.setattr("blipq_worker.serving.pushing.PART_BYTES", part)
    connected = _Push._client.fget  # type: ignore[attr-defined]
    refused = []

    def refuse(request: Any, **_: object) -> AWSResponse | None:
        if "If-None-Match" not in request.headers:
            return None
        refused.append(request.url)
        body = io.BytesIO(b"<Error><Code>NotImplemented</Code></Error>")
        body.stream = lambda **_: iter([body.read()])  # type: ignore[attr-defined]
        return AWSResponse(request.url, 501, {}, body)

    def simple(self: _Push) -> object:
        client = connected(self)
        client.meta.events.register("before-send.s3", refuse, unique_id="simple")
        return client

    monkeypatch.setattr(_Push, "_client", property(simple))
    place = bucket.place()
    push(folder, place)
    assert any("uploadId=" in url for url in refused)
    assert weights_of(place).present
    assert bucket.read(f"{place}/{WEIGHTS}") == (folder / WEIGHTS).read_bytes()
    assert uploads(bucket, place) == []


#: Pushes in parts of S3's least size, and dies by a real kill as it sends the fourth.
_KILLED = """
import os, signal, sys
from pathlib import Path
from blipq_worker.serving import pushing
pushing.PART_BYTES, pushing._AT_ONCE = 5 * 2**20, 1
send = pushing._Push._send_part
def send_or_die(self, where, path, part, sent):
    if part.number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return send(self, where, path, part, sent)
pushing._Push._send_part = send_or_die
pushing.push(Path(sys.argv[1]), sys.argv[2])
"""


def test_a_push_that_is_killed_goes_on_with_the_part_that_it_was_at(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 * 2**20
    make_large(folder, 5 * part)
    place = bucket.place()
    command = [sys.executable, "-c", _KILLED, str(folder), place]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert set(bucket.keys(place)) >= {DRAFT, "config.json"}
    assert not {MANIFEST, WEIGHTS} & set(bucket.keys(place))
    assert "its push has not ended" in (weights_of(place).problem or "")

    monkeypatch.setattr("blipq_worker.serving.pushing.PART_BYTES", part)
    sent = []
    connected = _Push._client.fget  # type: ignore[attr-defined]

    def watched(self: _Push) -> object:
        client = connected(self)
        client.meta.events.register(
            "before-call.s3.UploadPart", lambda params, **_: sent.append(params["url_path"])
        )
        return client

    monkeypatch.setattr(_Push, "_client", property(watched))
    served = push(folder, place)
    assert len(set(sent)) <= 1, sent
    assert bucket.read(f"{place}/{WEIGHTS}") == (folder / WEIGHTS).read_bytes()
    assert set(bucket.keys(place)) >= {MANIFEST, WEIGHTS}
    assert DRAFT not in bucket.keys(place)
    assert place_of(served).revision == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def test_the_command_prints_what_to_serve_and_refuses_in_one_line(
    bucket: Bucket, stack: LocalStack, folder: Path
) -> None:
    place = bucket.place()
    pushed = blipq("models", "push", str(folder), place, stack=stack)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout == f"{place}@{weights_revision(folder)}\n"
    refused = blipq("models", "push", str(folder / "runs"), place, stack=stack)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    listed = blipq("models", "list", stack=stack, BLIPQ_MODELS=f"default={place}")
    (line,) = [line for line in listed.stdout.splitlines() if place in line]
    assert line.endswith("MB  in S3")


def weights_revision(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()

"""A worker's own options, as they are written in the environment."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from pydantic import ValidationError

from blipq.s3.outputs import LOCAL_BUCKET
from blipq.settings import Settings
from blipq_worker.settings import WorkerSettings


def test_the_demo_model_is_served_by_default() -> None:
    assert WorkerSettings().models == {"default": "demo"}


@pytest.mark.parametrize(
    ("written", "served"),
    [
        ("default=opt-2.7b", {"default": "opt-2.7b"}),
        ("opt-2.7b", {"opt-2.7b": "opt-2.7b"}),
        ("default=demo, vqa=flan-t5-xl,", {"default": "demo", "vqa": "flan-t5-xl"}),
        ("default=/models/a+/models/b", {"default": "/models/a+/models/b"}),
        (r"default=/lr=1e-5\,bs=16,b=/x", {"default": "/lr=1e-5,bs=16", "b": "/x"}),
        (r"default=/a\+b", {"default": r"/a\+b"}),
    ],
)
def test_served_models_are_pairs(
    monkeypatch: pytest.MonkeyPatch, written: str, served: dict[str, str]
) -> None:
    monkeypatch.setenv("BLIPQ_MODELS", written)
    assert WorkerSettings().models == served


@pytest.mark.parametrize("wrong", ["", " , ", "a b=demo", "a/b=demo", "=demo"])
def test_a_served_model_has_a_name_that_fits_into_queue_names(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("BLIPQ_MODELS", wrong)
    with pytest.raises(ValidationError, match="models"):
        WorkerSettings()


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_ALLOWED_BUCKETS", "uploads, archive/2026/")
    monkeypatch.setenv("BLIPQ_IMAGE_FORMATS", "PNG")
    options = WorkerSettings()
    assert options.allowed_buckets == ("uploads", "archive/2026/")
    assert options.image_formats == ("PNG",)


@pytest.mark.parametrize(
    ("written", "read"),
    [("jpeg,png", ("JPEG", "PNG")), ("JPG, tiff", ("JPEG", "TIFF")), ("BMP", ("BMP",))],
)
def test_image_formats_have_the_names_that_pillow_compares_with(
    monkeypatch: pytest.MonkeyPatch, written: str, read: tuple[str, ...]
) -> None:
    monkeypatch.setenv("BLIPQ_IMAGE_FORMATS", written)
    assert WorkerSettings().image_formats == read


@pytest.mark.parametrize("wrong", ["", "JPEG PNG", "JPEG;PNG", "image/jpeg", ".png", "PNG,HEICS"])
def test_a_format_that_is_never_read_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Before, the worker started, and every job with another format failed for good."""
    monkeypatch.setenv("BLIPQ_IMAGE_FORMATS", wrong)
    with pytest.raises(
        ValidationError, match=r"image_formats\n.*(no format that Pillow|at least 1)"
    ):
        WorkerSettings()


def test_heic_is_read_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_IMAGE_FORMATS", "jpg,heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # no such package
    with pytest.raises(ValidationError, match="pip install pillow-heif"):
        WorkerSettings()
    registers = SimpleNamespace(
        register_heif_opener=lambda: monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", registers)
    assert WorkerSettings().image_formats == ("JPEG", "HEIF")


def test_durations_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIPQ_LEASE_S", "2m")
    monkeypatch.setenv("BLIPQ_DRAIN_TIMEOUT_S", "45")
    options = WorkerSettings()
    assert (options.lease_s, options.drain_timeout_s) == (120, 45)


def test_twice_a_batch_is_held_unless_said_otherwise() -> None:
    assert WorkerSettings(max_batch_size=8).threads == 16
    assert WorkerSettings(max_batch_size=8, concurrency=3).threads == 3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("QUANTIZATION", "int3"),
        ("DTYPE", "float8"),
        ("MAX_BATCH_SIZE", "0"),
        ("CONCURRENCY", "0"),
        ("LEASE_S", "1.9"),
        ("JOB_TIMEOUT_S", "soon"),
    ],
)
def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch, name: str, wrong: str) -> None:
    monkeypatch.setenv(f"BLIPQ_{name}", wrong)
    with pytest.raises(ValidationError, match=name.lower()):
        WorkerSettings()


def test_a_worker_beside_a_local_stack_writes_outputs_where_the_stacks_own_does() -> None:
    """One started as the README says refused the outputs that the first one wrote."""
    beside = Settings(redis_url="redis://h/0", endpoint_source="local stack")
    assert WorkerSettings().beside(beside).allowed_outputs == (LOCAL_BUCKET,)
    assert WorkerSettings(allowed_outputs=("a",)).beside(beside).allowed_outputs == ("a",)
    assert WorkerSettings().beside(Settings(redis_url="redis://h/0")).allowed_outputs == ()

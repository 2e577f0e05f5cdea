"""A worker's own options, beside those it shares with producers."""

import re
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from blipq.contract import Name, Seconds
from blipq.s3.outputs import LOCAL_BUCKET
from blipq.settings import Settings

Quantization = Literal["auto", "none", "int8", "nf4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
#: How people write formats whose names in Pillow are others.
_OTHER_NAMES = {"JPG": "JPEG", "HEIC": "HEIF", "TIF": "TIFF", "JPEG 2000": "JPEG2000"}
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


def _pairs(value: Any) -> Any:
    r"""``a=b,c=d`` as a mapping; a name alone stands for itself, and ``\,`` for a comma."""
    if not isinstance(value, str):
        return value
    parts = (part.replace("\\,", ",").strip() for part in re.split(r"(?<!\\),", value))
    pairs = (part.partition("=") for part in parts if part)
    return {name.strip(): (served.strip() or name.strip()) for name, _, served in pairs}


class Over(NamedTuple):
    """A LoRA adapter. base: the name of the served model that it is over."""

    base: str
    folder: str


def _over(value: Any) -> Any:
    """``a=base:folder`` pairs as a mapping."""
    pairs = _pairs(value)
    if not isinstance(value, str):
        return pairs
    found = {}
    for name, what in pairs.items():
        base, _, folder = what.partition(":")
        if not base or not folder:
            raise ValueError(f"{name}={what}: write an adapter as name=base:folder")
        found[name] = (base.strip(), folder.strip())
    return found


def _names(value: Any) -> Any:
    return (
        [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str)
        else value
    )


def _formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Formats by the names that Pillow compares with. Raises ValueError for one it cannot read."""
    from PIL import Image

    Image.init()
    formats = tuple(_OTHER_NAMES.get(name.upper(), name.upper()) for name in names)
    if "HEIF" in formats:
        _register_heif()
    for name, given in zip(formats, names, strict=True):
        if name not in Image.OPEN:
            known = ", ".join(sorted(Image.OPEN))
            raise ValueError(
                f"{given!r} is no format that Pillow reads; give some of these, with commas "
                f"between them: {known}"
            )
    return formats


def _register_heif() -> None:
    """Has Pillow read HEIC and HEIF. Raises ValueError where the package for it is missing."""
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("HEIC needs a package: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


class WorkerSettings(BaseSettings):
    """Options of a worker process. Each is read from ``BLIPQ_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="BLIPQ_", extra="ignore", frozen=True)

    models: Annotated[dict[Name, str], NoDecode, BeforeValidator(_pairs)] = Field(
        default={"default": "demo"},
        min_length=1,
        description=(
            "Served models: `name=what` pairs. What is a known model (`blipq models list`), or "
            "`generation[+retrieval]` as hub ids, folders, or `s3://bucket/prefix`; `\\,` and "
            "`\\+` stand for a comma and a plus in a name."
        ),
    )
    adapters: Annotated[dict[Name, Over], NoDecode, BeforeValidator(_over)] = Field(
        default={},
        max_length=32,
        description=(
            "LoRA adapters that are served as models of their own, over one copy of their base: "
            "`name=base:folder` pairs. Base is a name of BLIPQ_MODELS, the folder one that PEFT "
            "saved."
        ),
    )
    quantization: Quantization = Field(
        default="auto",
        description=(
            "How the language model's weights are kept; auto is none on a CPU, and on a GPU where "
            "all models fit so, else nf4, as where `blipq worker --processes` puts several on it."
        ),
    )
    dtype: Dtype = Field(
        default="auto",
        description="Compute type; auto is LAVIS's mix on a GPU and bfloat16 on CPUs that have it.",
    )
    quantize_vision: bool = Field(
        default=False,
        description="Quantize the vision tower, too, for less memory and a little less accuracy.",
    )
    attention: Attention = Field(
        default="auto",
        description=(
            "How attention is computed; auto is sdpa, and products of matrices in bfloat16 on a "
            "CPU. flash_attention_2 is for the vision tower and OPT on a GPU."
        ),
    )
    compile: bool = Field(
        default=False,
        description="Run the models through torch.compile: minutes at start, faster passes after.",
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")

    max_batch_size: int = Field(
        default=16, ge=1, le=256, description="Most jobs in one pass of the model."
    )
    decode_slots: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description=(
            "Most texts in the making at once; by default 32 on a CPU, and up to 128 on a GPU, by "
            "half of the memory that the weights leave. Their keys and values take 256 tokens per "
            "slot: at most on a CPU, from the start on a GPU. A search with beams counts as one on "
            "a CPU, where all together have at most 5 beams per slot, and on a GPU as one for each "
            "of its beams."
        ),
    )
    graphs: bool = Field(
        default=True,
        description="Take decode steps as CUDA graphs, where the GPU and the model allow it.",
    )
    batch_wait_timeout_s: Seconds = Field(
        default=0.005, ge=0, description="Longest a job waits for others of its batch, in seconds."
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Jobs held at once; by default 2 x max_batch_size, and on a GPU 2 x decode_slots: the "
            "next batch is ready."
        ),
    )
    fronts: int | None = Field(
        default=None,
        ge=0,
        le=60,
        description=(
            "Processes that take jobs, fetch and decode around the one that runs the model; 0 does "
            "all in one process. By default 0 on a CPU, and on a GPU one fewer than cores, 16 at "
            "most."
        ),
    )
    decode_threads: int = Field(default=4, ge=1, description="Images decoded at the same time.")

    jpeg_draft: bool = Field(
        default=True,
        description=(
            "Decode JPEGs of more than 4 million pixels at a half, a quarter or an eighth of their "
            "size: at least twice what the model sees."
        ),
    )
    decode_memory_bytes: int = Field(
        default=2**30,
        ge=1,
        description="Memory that decoding takes at most; a larger image is decoded alone.",
    )
    fetch_memory_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="Bytes of objects that are fetched or wait to be decoded, at most.",
    )

    feature_cache_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description=(
            "Host memory for what the model made of images, in bytes: an image that is used again "
            "is not downloaded, decoded or encoded. 0.1 MB an image, 0.7 to 2 MB with matches and "
            "for InstructBLIP."
        ),
    )
    max_image_bytes: int = Field(
        default=20 * 2**20, ge=1, description="Largest object fetched, in bytes."
    )
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="Largest image decoded, in pixels."
    )
    max_image_side: int = Field(
        default=16_384, ge=1, description="Longest side of an image decoded, in pixels."
    )
    max_image_aspect: float = Field(
        default=100.0, ge=1, description="Longer side over shorter side of an image, at most."
    )
    image_formats: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_names), AfterValidator(_formats)
    ] = Field(
        default=("JPEG", "PNG", "WEBP", "AVIF", "GIF"),
        min_length=1,
        description=(
            "Image formats accepted, by Pillow's names; HEIC needs the package pillow-heif "
            "(`blipq-worker[heic]`)."
        ),
    )
    fetch_timeout_s: Seconds = Field(
        default=30.0, gt=0, description="Longest one download may take in all, in seconds."
    )
    allowed_buckets: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        default=(), description="Buckets (or bucket/prefix) that may be read; empty means any."
    )
    https_images: bool = Field(
        default=True,
        description="Whether images may come from https:// URLs, through the guard.",
    )
    allowed_outputs: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        default=(),
        description=(
            "Buckets (or bucket/prefix) that `output` may write; empty means none. Never the "
            "inbox, the indexes or the job's own image."
        ),
    )

    results: (
        Annotated[str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$")] | None
    ) = Field(
        default=None,
        description=(
            "Where results over BLIPQ_RESULT_BYTES go, as `s3://bucket/prefix`; by default they "
            "stay in Redis. Give it a lifecycle rule. Producers need to read there."
        ),
    )
    result_bytes: int = Field(
        default=64 * 2**10,
        ge=1024,
        description="Largest result kept in Redis where BLIPQ_RESULTS is set, in bytes.",
    )

    lease_s: Seconds = Field(
        default=30.0,
        ge=2,  # long enough to write an output in
        description="A crashed worker's jobs are claimed again after this: at least 2.",
    )
    watchdog_s: Seconds = Field(
        default=120.0,
        gt=0,
        description="A pass of the model without progress for this long ends the process.",
    )
    drain_timeout_s: Seconds = Field(
        default=60.0, ge=0, description="Longest a stopping worker finishes its running jobs."
    )
    job_timeout_s: Seconds = Field(
        default=600.0, gt=0, description="Longest one job waits for the model."
    )
    retry_backoff_s: Seconds = Field(
        default=1.0, gt=0, description="First pause before a retry; doubles each time, up to 60 s."
    )
    health_port: int | None = Field(
        default=None, ge=0, le=65535, description="Port of /healthz and /readyz; none by default."
    )
    health_host: str = Field(
        default="",
        description="Address that this port is open at; by default all that IPv4 has here.",
    )
    canary: bool = Field(
        default=True,
        description="Check at start that the model describes two plain pictures; refuse if not.",
    )
    goldens: Path | None = Field(
        default=None,
        description=(
            "File that `blipq models record-golden` wrote: the answers expected at that check."
        ),
    )
    send_events: bool = Field(
        default=False,
        description=(
            "Send Celery's events, for Flower's lists of tasks; a sixth of what a job costs Redis."
        ),
    )

    @model_validator(mode="after")
    def _check_adapters(self) -> "WorkerSettings":
        for name, (base, _) in self.adapters.items():
            if base not in self.models:
                known = ", ".join(self.models)
                raise ValueError(f"adapter {name!r}: BLIPQ_MODELS has no {base!r}, but {known}")
            if name in self.models:
                raise ValueError(f"{name!r} is a name of BLIPQ_MODELS and of BLIPQ_ADAPTERS")
        return self

    @property
    def growing_slots(self) -> int:
        """Most texts in flight where their memory is not reserved ahead."""
        return self.decode_slots or 32

    def beside(self, settings: Settings) -> "WorkerSettings":
        """The same; on a local stack `output` may go where the stack's own worker writes it."""
        named = "allowed_outputs" in self.model_fields_set
        if named or settings.endpoint_source != "local stack":
            return self
        return self.model_copy(update={"allowed_outputs": (LOCAL_BUCKET,)})

    def filling(self, slots: int) -> "WorkerSettings":
        """The same, holding jobs enough to keep so many slots full where no number is given."""
        if self.concurrency is not None or 2 * slots <= self.threads:
            return self
        return self.model_copy(update={"concurrency": 2 * slots})

    def shared_by(self, fronts: int) -> "WorkerSettings":
        """The same for one of so many fronts: its share of the jobs, the decoding and the memory.

        Rounded up where a front would have too little to do anything at all.
        """
        return self.model_copy(
            update={
                "concurrency": ceil(self.threads / fronts),
                "decode_threads": ceil(self.decode_threads / fronts),
                "decode_memory_bytes": ceil(self.decode_memory_bytes / fronts),
                "fetch_memory_bytes": ceil(self.fetch_memory_bytes / fronts),
            }
        )

    @property
    def threads(self) -> int:
        """Threads of the pool: one per job held."""
        return self.concurrency or 2 * self.max_batch_size

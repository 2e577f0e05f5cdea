"""Which contract a job needs: workers of an earlier one leave it in the queue."""

import re
from collections.abc import Iterator

from blipq.contract.images import split_s3_uri
from blipq.contract.options import Options
from blipq.contract.requests import (
    CaptionRequest,
    DescribeRequest,
    EmbedRequest,
    MatchRequest,
    Request,
    SearchRequest,
    VQARequest,
)

#: Names of buckets and lengths of metadata that contract 1 has.
_BUCKET_1 = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_LONGEST_METADATA_1 = 512


def contract_of(request: Request, options: Options) -> int:
    """The lowest contract whose workers can run the job.

    Most jobs need contract 1: in a fleet that is being upgraded, every worker takes them.
    """
    if _is_of_confidence(request):
        return 4
    if request.image is not None and request.image.is_part:
        return 3
    if isinstance(request, MatchRequest) and request.explain:
        return 3
    buckets = all(_BUCKET_1.fullmatch(bucket) for bucket in _buckets(request, options))
    metadata = all(len(value) <= _LONGEST_METADATA_1 for value in _metadata(request))
    return 1 if buckets and metadata else 2


def _is_of_confidence(request: Request) -> bool:
    """Whether it sets an option that came with the probabilities of texts."""
    if not isinstance(request, CaptionRequest | VQARequest | DescribeRequest):
        return False
    generation = request.generation
    chosen = generation is not None and (generation.on_loop or generation.logprobs is not None)
    return bool(chosen) or request.min_confidence is not None


def _buckets(request: Request, options: Options) -> Iterator[str]:
    if request.image is not None and request.image.in_s3:
        yield request.image.bucket
    if options.output is not None:
        yield split_s3_uri(options.output)[0]


def _metadata(request: Request) -> Iterator[str]:
    """Metadata that a worker reads; a job's own it never does."""
    if isinstance(request, EmbedRequest) and request.index is not None:
        yield from request.index.metadata.values()
    if isinstance(request, SearchRequest):
        for wanted in (request.filter or {}).values():
            yield from (wanted,) if isinstance(wanted, str) else wanted

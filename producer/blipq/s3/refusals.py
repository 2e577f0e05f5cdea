"""What S3 means when it refuses: one table of its error codes, for workers and producers alike.

The status does not say it: an expired token is a 400 as a malformed key is, a skewed clock is a 403
as a closed bucket is. What the table does not know is judged by its status. Before it sends a
request botocore may fetch credentials elsewhere: a refusal there is not about an object.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from blipq.errors import InvalidRequest, QueueUnavailable
from blipq.program import blipq


class Refusal(StrEnum):
    """Why S3 refused a request."""

    PASSING = "passing"  # the store is busy or down, or two requests met
    FULL = "full"  # the store or a quota has no room until somebody makes some
    EXPIRED = "expired"  # the caller's token or clock; credential chains renew tokens by themselves
    ACCESS = "access"  # the caller's credentials or region: the request is not at fault
    ACCOUNT = "account"  # the account is suspended, unpaid, or was never given this service
    MISSING = "missing"
    CHANGED = "changed"  # a condition of the request does not hold
    FORBIDDEN = "forbidden"
    ENCRYPTION = "encryption"  # the object's key is not to be had
    INVALID = "invalid"


#: Refusals of the caller, whatever it requests.
OF_THE_ASKER = frozenset({Refusal.EXPIRED, Refusal.ACCESS, Refusal.ACCOUNT})
#: Refusals after which the same request may succeed: a producer may try again.
FOR_NOW = frozenset({Refusal.PASSING, Refusal.EXPIRED, Refusal.FULL})

_NAMED: Mapping[Refusal, str] = {
    Refusal.PASSING: """
        SlowDown SlowDownRead SlowDownWrite SlowDownException Busy ServerBusy
        RequestTimeout RequestTimeoutException
        TooManyRequests TooManyRequestsException RequestLimitExceeded BandwidthLimitExceeded
        RateLimitExceeded UserRateLimitExceeded QpsOverlimit
        RequestThrottled RequestThrottledException Throttling ThrottlingException ThrottledException
        PriorRequestNotComplete OverLimit OperationAborted ConditionalRequestConflict
        TemporaryRedirect IncompleteBody BadDigest XAmzContentSHA256Mismatch
        XAmzContentChecksumMismatch ClientDisconnect IDPCommunicationError
        InternalError InternalFailure ServiceUnavailable XMinioBackendDown
        XMinioServerNotInitialized XMinioIAMNotInitialized XMinioBucketMetadataNotInitialized
        KMS.InternalException KMS.KMSInternalException KMS.DependencyTimeoutException
        KMS.KeyUnavailableException KMS.ThrottlingException""",
    Refusal.FULL: """
        XMinioStorageFull XMinioAdminBucketQuotaExceeded QuotaExceeded BucketQuotaExceeded
        StorageQuotaExceeded InsufficientStorage InsufficientStorageSpace InsufficientCapacity""",
    Refusal.EXPIRED: """
        ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired ExpiredRequest
        RequestTimeTooSkewed RequestInTheFuture""",
    Refusal.ACCESS: """
        InvalidToken InvalidTokenId InvalidAccessKeyId AccessKeyDisabled InvalidClientTokenId
        UnrecognizedClientException
        SignatureDoesNotMatch InvalidSignatureException IncompleteSignature
        AuthorizationHeaderMalformed AuthorizationParametersError
        MissingAuthenticationToken MissingSecurityHeader
        PermanentRedirect IllegalLocationConstraintException InvalidRegion EndpointNotFound
        XMinioInsecureClientRequest CredentialsNotSupported InvalidSecurity""",
    # AllAccessDisabled and InvalidPayer: the provider has closed what the account holds.
    Refusal.ACCOUNT: """
        AccountProblem UserAccountProblem UserProjectAccountProblem AccountDisabled
        AccountSuspended InvalidAccountId AllAccessDisabled InvalidPayer
        NotSignedUp OptInRequired SubscriptionRequiredException PendingVerification
        NotEntitled UnauthorizedAccess UnauthorizedAccessError
        UserSuspended UserDisable UserDisabled InArrearOrInsufficientBalance""",
    Refusal.MISSING: "NoSuchKey NoSuchVersion NoSuchBucket NotFound",
    Refusal.CHANGED: "PreconditionFailed",
    Refusal.FORBIDDEN: "AccessDenied InvalidObjectState",
    # S3 answers InvalidRequest where an object needs its own key (SSE-C), which blipq never sends.
    Refusal.ENCRYPTION: "InvalidRequest ResourceIsEncryptedWithCustomerEncryptionKey",
}
CODES: Mapping[str, Refusal] = {
    code: refusal for refusal, codes in _NAMED.items() for code in codes.split()
}
#: What is in codes that the table does not know, in small letters.
_PARTS = {
    "throttl": Refusal.PASSING,
    "quotaexceeded": Refusal.FULL,
    "storagefull": Refusal.FULL,
    "kms": Refusal.ENCRYPTION,
}

_STATUSES = {
    # Redirects that botocore does not follow: the endpoint is a proxy's, or of another region.
    301: Refusal.ACCESS,
    302: Refusal.ACCESS,
    307: Refusal.ACCESS,
    308: Refusal.ACCESS,
    400: Refusal.INVALID,
    401: Refusal.ACCESS,  # by definition about the caller
    402: Refusal.ACCOUNT,  # payment required
    403: Refusal.FORBIDDEN,
    404: Refusal.MISSING,
    405: Refusal.MISSING,  # a delete marker, read by its version id
    411: Refusal.INVALID,
    412: Refusal.CHANGED,
    413: Refusal.INVALID,
    414: Refusal.INVALID,
    416: Refusal.INVALID,
    507: Refusal.FULL,
}
#: What somebody must do, for producers.
_TODO = {
    Refusal.FULL: "S3 has no room: delete objects or raise the quota",
    Refusal.EXPIRED: "S3 refuses for now: renew the credentials, or set the clock",
    Refusal.ACCESS: "S3 refuses: check keys, region and endpoint (BLIPQ_S3_*, or AWS's own)",
    Refusal.ACCOUNT: "S3 refuses the account: its owner must settle that with the provider",
}
#: Requests of botocore's credential chain. A refusal there is about the caller, whatever S3 would
#: have answered of the object.
_CREDENTIALS = ("AssumeRole", "GetSessionToken", "GetRoleCredentials", "CreateOAuth2Token")
#: ``(Code)`` as botocore has it, ``<Code>`` as S3 answers, or a quoted one.
_CODE = re.compile(r"""(?<=[(>"'])[A-Z][A-Za-z.]+(?=[)<"'])""")


class S3Refused(InvalidRequest):
    """S3 refuses, and would again; ``refusal`` is the reason."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


class S3Unavailable(QueueUnavailable):
    """S3 does not answer, or refuses for now; ``refusal`` is the reason."""

    def __init__(self, message: str, refusal: Refusal = Refusal.PASSING) -> None:
        super().__init__(message)
        self.refusal = refusal


def status_of(error: Any) -> int:
    """The HTTP status of a botocore ClientError, or 0."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Any) -> str:
    """The code of a botocore ClientError. HEAD has no body: there it is the status."""
    return str(error.response.get("Error", {}).get("Code") or "")


def refusal_of(error: Exception) -> Refusal:
    """Why S3 refused, from an exception of botocore, of boto3 or of these."""
    from botocore import exceptions as botocore

    if isinstance(error, S3Refused | S3Unavailable):
        return error.refusal
    if isinstance(error, botocore.ClientError):
        refusal = _refusal(code_of(error), status_of(error))
        if not error.operation_name.startswith(_CREDENTIALS):
            return refusal
        return refusal if refusal in OF_THE_ASKER | FOR_NOW else Refusal.ACCESS
    if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        return Refusal.ACCESS
    if isinstance(
        error,
        botocore.CredentialRetrievalError | botocore.TokenRetrievalError | botocore.SSOError,
    ):
        return Refusal.EXPIRED
    if isinstance(error, botocore.ParamValidationError):
        return Refusal.INVALID
    return refusal_in(str(error)) or Refusal.PASSING


def _refusal(code: str, status: int) -> Refusal:
    if (known := CODES.get(code)) is not None:
        return known
    found = (refusal for part, refusal in _PARTS.items() if part in code.lower())
    return next(found, _STATUSES.get(status, Refusal.PASSING))


def refusal_in(text: str) -> Refusal | None:
    """The refusal that a text names, as libraries report answers of S3 without a type."""
    return next((CODES[word] for word in _CODE.findall(text) if word in CODES), None)


@contextmanager
def s3_errors(place: str = "") -> Iterator[None]:
    """Botocore's exceptions as S3Refused and S3Unavailable, which name the place: S3 may not."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    try:
        yield
    except NoCredentialsError as error:
        message = (
            f"no S3 credentials: start a local stack with {blipq('up')}, or set "
            "BLIPQ_S3_ACCESS_KEY_ID and BLIPQ_S3_SECRET_ACCESS_KEY or AWS's own variables "
            "(one BLIPQ_* service variable switches the local stack off)"
        )
        raise S3Refused(message, Refusal.ACCESS) from error
    except PartialCredentialsError as error:
        message = (
            "half of the S3 credentials: BLIPQ_S3_ACCESS_KEY_ID and BLIPQ_S3_SECRET_ACCESS_KEY "
            "(or AWS's own variables) are set together, or neither is"
        )
        raise S3Refused(message, Refusal.ACCESS) from error
    except (ClientError, BotoCoreError, Boto3Error) as error:
        raise _told(error, place) from error


def _told(error: Exception, place: str) -> S3Refused | S3Unavailable:
    refusal = refusal_of(error)
    usual = "S3 does not answer" if refusal is Refusal.PASSING else "S3 refuses"
    if "(NoSuchBucket)" in str(error):
        usual = "S3 has no such bucket: make it, or name another"
    if "WRONG_VERSION_NUMBER" in str(error):
        usual = "S3 does not speak TLS: write http:// in its endpoint (BLIPQ_S3_ENDPOINT_URL)"
    message = ": ".join(filter(None, (_TODO.get(refusal, usual), place, str(error))))
    return (S3Unavailable if refusal in FOR_NOW else S3Refused)(message, refusal)

"""Which jobs an operator means."""

from pydantic import model_validator

from blipq.contract.base import Input, Kind, Metadata, Name
from blipq.contract.errors import ErrorCode
from blipq.contract.jobs import Status
from blipq.contract.options import Priority


class JobFilter(Input):
    """Jobs that meet every condition that is given; at least one is.

    code: of the error of a job that failed. metadata: pairs that a job must have.
    """

    status: Status | None = None
    kind: Kind | None = None
    model: Name | None = None
    priority: Priority | None = None
    code: ErrorCode | None = None
    metadata: Metadata | None = None
    tenant: Name | None = None

    @model_validator(mode="after")
    def _something(self) -> "JobFilter":
        if not self.model_dump(exclude_none=True, exclude_defaults=True):
            raise ValueError("name at least one condition")
        return self

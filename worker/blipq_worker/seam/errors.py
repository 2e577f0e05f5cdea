"""Why an item came to nothing.

InferenceError
├── EngineGone      the connection ended before the answer: the item may not have been to blame
├── EngineBusy      all credits were in use for the whole timeout: nothing was sent
├── UnknownModel    the engine does not serve it (LookupError): nothing was sent
└── ItemFailed      the engine's verdict on this item; has .failure
"""

from blipq_worker.seam.requests import Failure


class InferenceError(Exception):
    """Base of what an ``Inference`` raises."""


class EngineGone(InferenceError):
    """The connection to the engine ended, or there is none. The item says nothing by itself."""


class EngineBusy(InferenceError):
    """The engine had no credit left for this front within the timeout."""


class UnknownModel(InferenceError, LookupError):
    """The engine does not serve this model."""


class ItemFailed(InferenceError):
    """The engine ran the item, or refused it, and says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.code}: {failure.message}")
        self.failure = failure


class AddressError(Exception):
    """No engine can listen there; the message says why, and what would help."""


class ProtocolError(Exception):
    """The other side broke the protocol: the connection ends, and nothing else."""

"""Whether an item can go to an engine at all, checked before anything is sent."""

from blipq_worker.inference.interface import ItemFailed
from blipq_worker.inference.protocol import Submit, checked
from blipq_worker.inference.requests import Failure, Item


def require_sendable(model: str, item: Item) -> None:
    """Raises ItemFailed for what no message can carry."""
    try:
        checked(Submit(model, "normal", None, item, alone=False), 0)
    except ValueError as error:
        message = f"a text or a number is out of bounds: {error}"
        raise ItemFailed(Failure("permanent", "invalid_request", message)) from error

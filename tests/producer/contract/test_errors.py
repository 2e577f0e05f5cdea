"""The error tree is what its documentation draws."""

import inspect
import re

import pytest

import blipq
from blipq import errors
from blipq.contract import ErrorCode

CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.BlipqError)
}


def drawn() -> dict[str, str]:
    """Each class of the docstring's tree and the one above it."""
    above: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    (?P<branches>(?:[│├└─ ]{4})*)(?P<name>[A-Z]\w+)", line)
        if found:
            depth = len(found["branches"]) // 4
            path[depth:] = [found["name"]]
            above[found["name"]] = path[depth - 1] if depth else "Exception"
    return above


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert drawn() == {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()}


def test_every_error_says_whether_trying_again_can_help() -> None:
    retryable = {name for name, kind in CLASSES.items() if kind.retryable}
    assert retryable == {
        "QueueUnavailable",
        "QueueFull",
        "TenantLimited",
        "ResultTimeout",
        "TransientError",
    }


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidRequest, ValueError),
        (errors.JobNotFound, LookupError),
        (errors.ResultTimeout, TimeoutError),
    ],
)
def test_errors_are_also_the_builtin_ones(kind: type, builtin: type) -> None:
    assert issubclass(kind, builtin)


def test_a_failed_job_decides_itself_whether_it_is_retryable() -> None:
    failure = errors.JobFailed(
        "gone", "job_1", code=ErrorCode.IMAGE_UNAVAILABLE, attempts=6, retryable=True
    )
    assert failure.retryable
    assert (failure.code, failure.attempts, failure.job_id) == ("image_unavailable", 6, "job_1")


def test_every_error_a_caller_can_meet_is_exported() -> None:
    internal = {"WorkError", "PermanentError", "TransientError"}
    assert set(CLASSES) - internal <= set(blipq.__all__)


def test_all_exported_names_exist() -> None:
    assert all(hasattr(blipq, name) for name in blipq.__all__)
    assert blipq.__all__ == sorted(blipq.__all__)

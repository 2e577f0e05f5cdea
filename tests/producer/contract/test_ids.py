"""Job ids are UUIDv7: unique, and in the order in which they were made."""

import time
import uuid

from blipq.submission import new_id


def test_an_id_is_a_uuid_of_version_7() -> None:
    id = new_id()
    assert id.startswith("job_")
    parsed = uuid.UUID(id.removeprefix("job_"))
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)


def test_an_id_carries_the_time_it_was_made() -> None:
    before = time.time_ns() // 1_000_000
    made = int(new_id().removeprefix("job_").replace("-", "")[:12], 16)
    assert before <= made <= time.time_ns() // 1_000_000


def test_ids_sort_by_the_millisecond_they_were_made() -> None:
    ids = []
    while len(ids) < 5:
        id = new_id()
        if not ids or id[:17] != ids[-1][:17]:
            ids.append(id)
    assert ids == sorted(ids)


def test_ids_do_not_repeat() -> None:
    assert len({new_id() for _ in range(10_000)}) == 10_000

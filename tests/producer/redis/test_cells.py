"""Which cell has a job: rendezvous hashing over versioned lists, and ids that say their cell."""

from collections import Counter

import pytest

from blipq import InvalidRequest, Settings
from blipq.redis.cells import MOST_PLACES, Cells, cell_of, id_in, is_clients, named_urls, ranked
from blipq.submission import checked, new_id

URLS = {name: f"redis://{name}.example:6379/0" for name in ("a", "b", "c")}
ALL = tuple(URLS)
KEYS = [f"order-{number}" for number in range(10_000)]


def every(cell: str) -> bool:
    return True


def test_jobs_spread_evenly_over_cells() -> None:
    found = Counter(ranked(new_id(), ("a", "b"))[0] for _ in range(20_000))
    assert 0.48 < found["a"] / 20_000 < 0.52


def test_a_cell_that_joins_takes_its_share_of_keys_and_moves_no_other() -> None:
    before = {key: ranked(key, ("a", "b"))[0] for key in KEYS}
    after = {key: ranked(key, ALL)[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {"c"}
    assert 0.3 < len(moved) / len(KEYS) < 0.37


def test_the_order_in_which_cells_are_named_changes_nothing() -> None:
    assert all(ranked(key, ALL) == ranked(key, ALL[::-1]) for key in KEYS[:100])


def test_an_id_that_a_client_made_says_its_cell() -> None:
    id = new_id()
    assert cell_of(id) is None
    assert cell_of(id_in(id, "a")) == "a"
    assert id_in(id_in(id, "a"), "b") == f"{id}_b"


@pytest.mark.parametrize("id", ["order-42_a", "job_1_a", "mine", "job_x"])
def test_an_id_of_a_callers_own_says_no_cell(id: str) -> None:
    assert cell_of(id) is None
    assert id_in(id, "a") == id


def test_a_job_is_looked_for_where_its_id_says_or_first_where_the_newest_list_has_it() -> None:
    cells = Cells.of(URLS, [(1, ("a", "b")), (2, ALL)])
    assert cells.likely(id_in(new_id(), "b")) == ["b"]
    for key in KEYS[:100]:
        new, old = ranked(key, ALL)[0], ranked(key, ("a", "b"))[0]
        found = cells.likely(key)
        assert found[: len({new, old})] == list(dict.fromkeys([new, old]))
        assert sorted(found) == sorted(ALL)


def on_the_way(*steps: tuple[int, int, str]) -> list[tuple[int, str]]:
    """Steps, of each the version of a list, the rank and the cell."""
    return [(version * MOST_PLACES + rank, cell) for version, rank, cell in steps]


def test_a_key_goes_by_the_cell_of_each_earlier_list_to_that_of_the_newest() -> None:
    cells = Cells.of(URLS, [(1, ("a", "b")), (2, ALL)])
    for key in KEYS[:100]:
        new, old = ranked(key, ALL)[0], ranked(key, ("a", "b"))[0]
        expected = on_the_way((1, 0, old), (2, 0, new))
        assert cells.path(key, every) == (expected[:1] if new == old else expected)


def test_a_key_that_comes_back_to_a_cell_is_recorded_there() -> None:
    cells = Cells.of(URLS, [(1, ("a", "b")), (2, ("a",)), (3, ("a", "b"))])
    key = next(key for key in KEYS if ranked(key, ("a", "b"))[0] == "b")
    assert cells.path(key, every) == on_the_way((1, 0, "b"), (2, 0, "a"), (3, 0, "b"))


def test_a_key_goes_down_its_ranks_to_the_first_cell_that_serves_the_model() -> None:
    cells = Cells.of(URLS, [(1, ALL)])
    for key in KEYS[:100]:
        ranks = ranked(key, ALL)
        expected = on_the_way(*((1, rank, cell) for rank, cell in enumerate(ranks)))
        assert cells.path(key, lambda cell, ranks=ranks: cell == ranks[2]) == expected  # type: ignore[misc]


def test_a_key_that_was_sent_to_a_cell_without_its_model_goes_on_through_the_ranks() -> None:
    cells = Cells.of(URLS, [(1, ALL)])
    first, second, third = ranked("order-1", ALL)

    def serves(cell: str) -> bool:
        return cell == second

    sent = on_the_way((1, 2, third))
    on = on_the_way((1, 2, third), (1, 3, first), (1, 4, second))
    assert cells.path("order-1", serves, sent[0]) == on
    assert cells.path("order-1", every, sent[0]) == sent
    assert cells.path("order-1", lambda cell: False, sent[0]) == sent
    newer = on_the_way((2, 0, third))  # of a list that this client lacks
    assert cells.path("order-1", serves, newer[0]) == newer


# -- settings --


def of(**given: str) -> Settings:
    return checked(Settings, **given)


def test_several_urls_are_named_with_spaces_or_commas_between() -> None:
    sentinels = "sentinel://h1:26379,h2:26379/0?master=m"
    expected = {"a": "redis://:p=q@h:1/0", "b": sentinels}
    assert named_urls(f"a=redis://:p=q@h:1/0,b={sentinels}") == expected
    assert named_urls(f" a=redis://:p=q@h:1/0\n b={sentinels} ") == expected


def test_settings_of_one_cell_are_those_of_its_redis_and_broker() -> None:
    cells, brokers = "a=redis://h:1/0 b=redis://h:2/0", "a=amqp://h//a b=amqp://h//b"
    fleet = of(cells=cells, cell_brokers=brokers, cell_lists="1=a,b")
    one = of(cells=cells, cell_brokers=brokers, cell="b")
    assert fleet.is_fleet
    assert not one.is_fleet
    for settings in (one, fleet.in_cell("b")):
        assert settings.redis_url == "redis://h:2/0"
        assert settings.effective_broker_url == "amqp://h//b"
    assert of(cells=cells, cell="a").effective_broker_url == "redis://h:1/0"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cells": "redis://h:1/0"}, "write NAME=URL"),
        ({"cells": "a=redis://h:1/0 a=redis://h:2/0"}, "named twice"),
        ({"cells": "a=redis://h:1/0 b=redis://h:1/0"}, "the same URL"),
        ({"cells": "a=http://h"}, "redis://"),
        ({"cells": "A=redis://h:1/0"}, "write NAME=URL"),
        ({"cells": "a=redis://h:1/0", "cell": "b"}, "none of BLIPQ_CELLS: a"),
        ({"cell": "b"}, "need BLIPQ_CELLS"),
        ({"cells": "a=redis://h:1/0", "redis_url": "redis://h:2/0"}, "in place of"),
        ({"cells": "a=redis://h:1/0", "broker_url": "amqp://h"}, "in place of"),
        ({"cells": "a=redis://h:1/0", "cell_brokers": "b=amqp://h"}, "of none"),
        (
            {"cells": "a=redis://h:1/0 b=redis://h:2/0"},
            "must name the cells that take new jobs: 1=a,b",
        ),
        ({"cells": "a=redis://h:1/0", "cell_lists": "1=a,b"}, "no such cell: b"),
        ({"cells": "a=redis://h:1/0", "cell_lists": "2=a 1=a"}, "versions of lists go up"),
        ({"cells": "a=redis://h:1/0", "cell_lists": "a"}, "VERSION=NAME"),
        ({"cells": "a=redis://h:1/0", "cell_lists": "1=a,a"}, "names a cell twice"),
    ],
)
def test_cells_that_cannot_be_meant_are_refused_by_name(given: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        of(**given)


def test_what_serves_one_cell_needs_no_lists() -> None:
    assert of(cells="a=redis://h:1/0 b=redis://h:2/0", cell="b").cell_lists == ()
    assert of(cells="a=redis://h:1/0").is_fleet


@pytest.mark.parametrize("id", [new_id(), id_in(new_id(), "a")], ids=["one Redis", "cells"])
def test_ids_that_clients_make_are_told_from_others(id: str) -> None:
    assert is_clients(id)
    assert not is_clients(f"{id}-1")
    assert not is_clients("order-1")


def test_passwords_of_cells_are_hidden() -> None:
    settings = of(cells="a=redis://:hush@h:1/0 b=redis://:still@h:2/0", cell_lists="1=a,b")
    assert {"hush", "still"} <= set(settings.secrets)
    assert "hush" not in repr(settings) + settings.endpoints
    assert "a=h:1" in settings.endpoints

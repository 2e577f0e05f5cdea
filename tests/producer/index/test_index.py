"""The index: exact cosines, one row per id whoever writes, one checkpoint per table."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blipq import Settings
from blipq.errors import QueueUnavailable
from blipq.index import store as module
from blipq.index.store import Entry, Index, Indexes, Space, UnknownIndex
from blipq.local.stack import LocalStack, free_port
from blipq.s3.refusals import Refusal, S3Unavailable
from refusing_s3 import refusing_s3

SPACE = Space("checkpoint", "0123456789abcdef")
OTHER = Space("other", "fedcba9876543210")


def vectors(count: int, seed: int = 0) -> Any:
    """(count, 32, 256), each row of length 1."""
    drawn = np.random.default_rng(seed).standard_normal((count, 32, 256))
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float16)


def entries(count: int, seed: int = 0, **metadata: str) -> list[Entry]:
    return [
        Entry(f"s3://b/{number:03}", f"s3://b/{number:03}", f"etag-{number}", each, metadata)
        for number, each in enumerate(vectors(count, seed))
    ]


def cosines(queries: Any, stored: Any) -> Any:
    """By brute force: the best of 32 per query, the mean over queries."""
    products = np.einsum("qd,nvd->nqv", queries, stored.astype(np.float32))
    return products.max(axis=2).mean(axis=1)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of a place with nothing in it."""
    if request.param == "folder":
        return Settings(indexes=str(tmp_path / "indexes"))
    stack: LocalStack = request.getfixturevalue("stack")
    fields = stack.settings_fields() | {
        "indexes": f"s3://indexes-{tmp_path.name[-1]}/{free_port()}"
    }
    return Settings.model_validate(fields)


@pytest.fixture
def indexes(tmp_path: Path) -> Indexes:
    return Indexes(Settings(indexes=str(tmp_path / "indexes")))


@pytest.fixture
def index(indexes: Indexes) -> Index:
    return indexes.open_or_create("photos", SPACE)


def in_threads(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_an_index_is_made_filled_searched_and_deleted(place: Settings) -> None:
    indexes = Indexes(place)
    assert indexes.infos() == []
    with pytest.raises(UnknownIndex, match="no index 'photos'"):
        indexes.open("photos", SPACE)
    indexes.open_or_create("photos", SPACE).upsert(entries(3, album="summer"))
    (info,) = Indexes(place).infos()
    assert (info.name, info.checkpoint, info.revision) == ("photos", *vars_of(SPACE))
    assert (info.images, info.bytes > 3 * 32 * 256 * 2) == (3, True)
    assert info.created_at <= info.changed_at
    best, *_ = Indexes(place).open("photos", SPACE).search(vectors(3)[1, :1], 2)
    assert (best.id, best.etag) == ("s3://b/001", "etag-1")
    assert best.metadata == {"album": "summer"}
    assert best.cosine == pytest.approx(1, abs=1e-3)
    indexes.delete(info)
    assert indexes.infos() == []


def vars_of(space: Space) -> tuple[str, str]:
    return space.checkpoint, space.revision


@pytest.mark.parametrize("queries", [1, 32])
def test_a_search_equals_brute_force(index: Index, queries: int) -> None:
    index.upsert(entries(200))
    asked = vectors(1, seed=9)[0, :queries].astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    expected = cosines(asked, vectors(200))
    order = np.argsort(-expected)[:20]
    found = index.search(asked, 20)
    assert [each.id for each in found] == [f"s3://b/{number:03}" for number in order]
    assert [each.cosine for each in found] == pytest.approx(expected[order].tolist(), abs=1e-4)


def test_an_image_that_is_indexed_again_is_replaced(index: Index) -> None:
    index.upsert(entries(5, seed=1, album="old"))
    index.upsert([*entries(1, seed=2), *entries(1, seed=3, album="new")])
    assert index.info().images == 5
    best, *_ = index.search(vectors(1, seed=3)[0, :1], 1)
    assert (best.id, best.metadata) == ("s3://b/000", {"album": "new"})


def test_images_are_removed_by_id(index: Index) -> None:
    index.upsert([*entries(3), replace(entries(1)[0], id="it's")])
    assert index.delete(["s3://b/001", "it's", "unknown"]) == 2
    assert {each.id for each in index.search(vectors(1)[0, :1], 9)} == {"s3://b/000", "s3://b/002"}


def test_a_filter_takes_equal_values_all_names_and_any_of_a_list(index: Index) -> None:
    for name, metadata in {
        "a": {"album": "summer", "by": "Ann"},
        "b": {"album": "summer", "by": "Bob"},
        "c": {"album": "winter", "by": "Ann"},
        "d": {},
    }.items():
        index.upsert([replace(entries(1)[0], id=name, metadata=metadata)])

    def found(**filter: Any) -> list[str]:
        return sorted(each.id for each in index.search(vectors(1)[0, :1], 9, filter))

    assert found(album="summer") == ["a", "b"]
    assert found(album="summer", by="Ann") == ["a"]
    assert found(by=["Ann", "Eve"]) == ["a", "c"]
    assert found(album="spring") == found(unknown="x") == []
    assert found() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "hostile",
    [
        "'",
        "''",
        "') OR (1=1",
        "x'; DROP TABLE photos; --",
        '"',
        '"]',
        "\\",
        "\\'",
        "%",
        "\n",
        "ü猫",
    ],
)
def test_a_filter_is_data_whatever_it_holds(index: Index, hostile: str) -> None:
    plain, odd = entries(2)
    index.upsert([plain, replace(odd, metadata={hostile: hostile})])
    (found,) = index.search(vectors(1)[0, :1], 9, {hostile: hostile})
    assert found.metadata == {hostile: hostile}
    assert index.search(vectors(1)[0, :1], 9, {"other": hostile}) == []


def test_vectors_of_two_checkpoints_never_meet(indexes: Indexes) -> None:
    indexes.open_or_create("photos", SPACE).upsert(entries(2))
    with pytest.raises(UnknownIndex, match=r"no vectors of other .* but of checkpoint"):
        indexes.open("photos", OTHER)
    indexes.open_or_create("photos", OTHER).upsert(entries(1, seed=5))
    assert [info.images for info in indexes.infos("photos")] == [2, 1]
    assert len(indexes.open("photos", SPACE).search(vectors(1)[0, :1], 9)) == 2


def test_writers_that_add_the_same_images_at_once_leave_one_of_each(place: Settings) -> None:
    """Found with LanceDB 0.40: without a primary key two writers can both insert an id."""

    def write(seed: int) -> None:
        own = Indexes(place).open_or_create("photos", SPACE)
        order = np.random.default_rng(seed).permutation(12)
        every = entries(12, seed)
        for start in range(0, 12, 4):
            own.upsert([every[number] for number in order[start : start + 4]])

    Indexes(place).open_or_create("photos", SPACE)
    in_threads(*[lambda seed=seed: write(seed) for seed in range(4)])
    index = Indexes(place).open("photos", SPACE)
    ids = [each.id for each in index.search(vectors(1)[0, :1], 999)]
    assert sorted(ids) == [f"s3://b/{number:03}" for number in range(12)]


def test_two_processes_may_make_the_same_index(place: Settings) -> None:
    in_threads(*[lambda: Indexes(place).open_or_create("photos", SPACE).upsert(entries(2))] * 4)
    assert [info.images for info in Indexes(place).infos()] == [2]


def test_compaction_changes_no_answer(index: Index) -> None:
    for entry in entries(9):
        index.upsert([entry])
    index.delete(["s3://b/004"])
    before = index.search(vectors(1)[0, :1], 9)
    index.compact()
    assert index.search(vectors(1)[0, :1], 9) == before
    assert len(before) == 8


def test_small_files_are_merged_when_there_are_many(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MANY_FILES", 8)

    def files() -> int:
        return int(index._table.stats()["fragment_stats"]["num_fragments"])

    for number in range(10):
        index.upsert([replace(entries(1)[0], id=str(number))])
        index.compact(at_once=False)
    assert files() < 8


@pytest.mark.parametrize("queries", [1, 32])
def test_quantized_vectors_change_no_answer_that_is_near(
    index: Index, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INDEXED_FROM", 256)
    monkeypatch.setattr(module, "_IMAGES_PER_PARTITION", 64)
    stored = np.concatenate([vectors(400), vectors(100, seed=5)])
    written = [replace(each, id=f"{n:03}") for n, each in enumerate(entries(400))]
    index.upsert(written)
    index.compact()
    assert names(index) == ["ids", "vectors-6"]
    # Rows that come, change and go after that are found, or not, as before.
    later = [replace(each, id=f"{n + 400:03}") for n, each in enumerate(entries(100, seed=5))]
    index.upsert([*later, replace(written[0], vectors=stored[499])])
    stored[0] = stored[499]
    index.delete(["007"])
    asked = vectors(1, seed=9)[0, :queries].astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    expected = np.delete(cosines(asked, stored), 7)
    for _ in range(2):
        found = index.search(asked, 20)[:10]
        assert [each.cosine for each in found] == pytest.approx(
            np.sort(expected)[::-1][:10].tolist(), abs=1e-4
        )
        index.compact()


def test_vectors_are_quantized_anew_when_there_are_many_more(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INDEXED_FROM", 16)
    monkeypatch.setattr(module, "_IMAGES_PER_PARTITION", 16)
    partitions = []
    for count in (16, 31, 40):
        index.upsert(entries(count))
        index.compact()
        partitions.append(names(index)[1:])
    assert partitions == [["vectors-1"], ["vectors-1"], ["vectors-2"]]


def names(index: Index) -> list[str]:
    return sorted(each.name for each in index._table.list_indices())


def test_a_search_goes_on_after_the_index_was_made_again(indexes: Indexes, index: Index) -> None:
    index.upsert(entries(3))
    elsewhere = Indexes(indexes._settings)
    (info,) = elsewhere.infos()
    elsewhere.delete(info)
    with pytest.raises(QueueUnavailable):
        index.search(vectors(1)[0, :1], 9)
    with pytest.raises(UnknownIndex):
        indexes.open("photos", SPACE)
    elsewhere.open_or_create("photos", SPACE).upsert(entries(1))
    assert len(indexes.open("photos", SPACE).search(vectors(1)[0, :1], 9)) == 1


def test_etags_are_read_by_id(index: Index) -> None:
    index.upsert(entries(9))
    found = index.etags(["s3://b/002", "s3://b/003", "it's unknown"])
    assert found == {"s3://b/002": "etag-2", "s3://b/003": "etag-3"}


def test_a_place_that_does_not_answer_is_said_to_be_away(tmp_path: Path) -> None:
    nowhere = Settings(
        indexes="s3://bucket/indexes",
        s3_endpoint_url=f"http://127.0.0.1:{free_port()}",
        s3_access_key_id="key",
        s3_secret_access_key="secret",  # type: ignore[arg-type]
    )
    with pytest.raises(QueueUnavailable):
        Indexes(nowhere).open("photos", SPACE)
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(QueueUnavailable):
        Indexes(Settings(indexes=str(file))).open_or_create("photos", SPACE)


@pytest.mark.parametrize(
    ("status", "code", "refusal"),
    [(400, "ExpiredToken", Refusal.EXPIRED), (403, "InvalidAccessKeyId", Refusal.ACCESS)],
)
def test_a_place_that_refuses_the_worker_says_so(status: int, code: str, refusal: Refusal) -> None:
    """LanceDB asks S3 by itself, and has no type for what it answers."""
    with refusing_s3() as s3:
        places = Indexes(s3.settings.model_copy(update={"indexes": "s3://indexes/a"}))
        s3.refuse(status, code)
        places._found = True
        with pytest.raises(S3Unavailable) as raised:
            places.infos()
    assert raised.value.refusal is refusal

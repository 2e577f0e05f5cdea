"""What a front has noted outlives it, at whatever moment it is killed."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from blipq.contract import Kind
from blipq.ledger.worker import Claim
from blipq_worker.claims import Held
from blipq_worker.fronts.holdings import Holding, Holdings, read_holdings

QUEUE = "blipq.default.normal"


def claim_of(id: str, *, solo: bool = False, token: str = "7-abc") -> Claim:
    return Claim(
        id=id,
        kind=Kind.CAPTION,
        model="default",
        queue=QUEUE,
        request="{}",
        output="",
        token=token,
        attempts=1,
        retries=0,
        solo=solo,
        queue_ms=0,
        expires_in=60,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "front-0.held"


@pytest.fixture
def holdings(path: Path) -> Holdings:
    return Holdings(path, 4)


def test_a_job_is_followed_from_its_message_to_its_end(holdings: Holdings, path: Path) -> None:
    holdings.take("a", Kind.CAPTION, QUEUE)
    assert read_holdings(path) == [Holding("a", Kind.CAPTION, QUEUE)]
    holdings.asking("a", "nonce")
    assert read_holdings(path) == [Holding("a", Kind.CAPTION, QUEUE, nonce="nonce")]
    holdings.claimed(claim_of("a", solo=True))
    claimed = Holding("a", Kind.CAPTION, QUEUE, "7-abc", True, "claimed")
    assert read_holdings(path) == [claimed]
    with holdings.decoding("a"):
        assert [each.stage for each in read_holdings(path)] == ["decoding"]
    assert read_holdings(path) == [claimed]
    holdings.unclaimed("a")
    assert read_holdings(path) == [Holding("a", Kind.CAPTION, QUEUE)]
    holdings.release("a")
    assert read_holdings(path) == []


def test_a_job_is_marked_until_the_last_of_its_pictures_is_decoded(
    holdings: Holdings, path: Path
) -> None:
    holdings.claimed(claim_of("a"))
    with holdings.decoding("a"):
        with holdings.decoding("a"):
            pass
        assert [each.stage for each in read_holdings(path)] == ["decoding"]
    assert [each.stage for each in read_holdings(path)] == ["claimed"]


def test_a_suspect_is_on_record_until_its_claim_ends(holdings: Holdings, path: Path) -> None:
    held = Held(holdings)
    for id in ("a", "b"):
        holdings.take(id, Kind.CAPTION, QUEUE)
        held.add(claim_of(id))
    held.suspect(claim_of("a"))
    with held.decoding(claim_of("b")):
        held.suspect(claim_of("b"))
    assert [each.stage for each in read_holdings(path)] == ["suspect"] * 2
    assert held.is_suspect(claim_of("a"))
    held.remove(claim_of("a"))
    held.suspect(claim_of("a"))  # too late
    assert [each.stage for each in read_holdings(path)] == ["taken", "suspect"]
    assert not held.is_suspect(claim_of("a"))


def test_a_second_message_of_a_job_does_not_end_the_record_of_its_claim(
    holdings: Holdings, path: Path
) -> None:
    holdings.take("a", Kind.CAPTION, QUEUE)
    holdings.claimed(claim_of("a"))
    holdings.take("a", Kind.CAPTION, QUEUE)
    holdings.release("a")
    assert [each.token for each in read_holdings(path)] == ["7-abc"]


def test_the_message_that_is_settled_first_leaves_the_claim_on_record(
    holdings: Holdings, path: Path
) -> None:
    holdings.take("a", Kind.CAPTION, QUEUE)
    holdings.claimed(claim_of("a"))
    holdings.release("a")
    assert [each.stage for each in read_holdings(path)] == ["claimed"]
    holdings.unclaimed("a")
    assert read_holdings(path) == []


def test_a_claim_names_the_queue_of_its_job_not_of_its_message(
    holdings: Holdings, path: Path
) -> None:
    holdings.take("a", Kind.CAPTION, "blipq.other.high")
    holdings.claimed(claim_of("a"))
    assert [each.queue for each in read_holdings(path)] == [QUEUE]


def test_a_picture_that_is_decoded_longer_than_its_claim_marks_no_other_job(
    holdings: Holdings, path: Path
) -> None:
    holdings.claimed(claim_of("a"))
    with holdings.decoding("a"):
        holdings.unclaimed("a")
        holdings.claimed(claim_of("b"))
        with holdings.decoding("b"):
            pass
    assert [(each.id, each.stage) for each in read_holdings(path)] == [("b", "claimed")]


def test_the_claims_of_a_process_are_noted_as_they_come_and_go(
    holdings: Holdings, path: Path
) -> None:
    held = Held(holdings)
    holdings.take("a", Kind.CAPTION, QUEUE)
    with held.asking("a", "first"):
        assert [each.nonce for each in read_holdings(path)] == ["first"]
        held.add(claim_of("a"))
    holdings.take("a", Kind.CAPTION, QUEUE)
    with held.asking("a", "second"):  # another message of a job that runs here
        assert [each.token for each in read_holdings(path)] == ["7-abc"]
    assert [each.stage for each in read_holdings(path)] == ["claimed"]
    with held.decoding(claim_of("a")):
        assert [each.stage for each in read_holdings(path)] == ["decoding"]
    assert held.remove(claim_of("a"))
    assert [(each.stage, each.nonce) for each in read_holdings(path)] == [("taken", None)]


def test_a_claim_that_was_not_granted_leaves_the_message_alone_on_record(
    holdings: Holdings, path: Path
) -> None:
    held = Held(holdings)
    holdings.take("a", Kind.CAPTION, QUEUE)
    with held.asking("a", "nonce"):
        pass
    assert read_holdings(path) == [Holding("a", Kind.CAPTION, QUEUE)]


def test_more_jobs_than_places_are_held_without_a_note(holdings: Holdings, path: Path) -> None:
    for number in range(6):
        holdings.take(f"job-{number}", Kind.VQA, QUEUE)
    assert len(read_holdings(path)) == 4
    for number in range(6):
        with holdings.decoding(f"job-{number}"):
            holdings.asking(f"job-{number}", "nonce")
        holdings.release(f"job-{number}")
    assert read_holdings(path) == []
    holdings.take("again", Kind.VQA, QUEUE)
    assert [each.id for each in read_holdings(path)] == ["again"]


def test_the_longest_id_has_room_in_the_widest_script(holdings: Holdings, path: Path) -> None:
    longest = "\U0001f600" * 255
    holdings.take(longest, Kind.CAPTION, QUEUE)
    assert [each.id for each in read_holdings(path)] == [longest]


def test_a_record_that_is_torn_is_skipped_and_the_others_are_read(
    holdings: Holdings, path: Path
) -> None:
    holdings.take("torn", Kind.CAPTION, QUEUE)
    holdings.take("whole", Kind.CAPTION, QUEUE)
    data = bytearray(path.read_bytes())
    at = data.index(b"torn")
    data[at] ^= 0xFF
    path.write_bytes(data)
    assert [each.id for each in read_holdings(path)] == ["whole"]


def test_a_torn_claim_leaves_the_message_on_record(holdings: Holdings, path: Path) -> None:
    holdings.claimed(claim_of("a"))
    data = bytearray(path.read_bytes())
    data[data.index(b"7-abc")] ^= 0xFF
    path.write_bytes(data)
    assert read_holdings(path) == [Holding("a", Kind.CAPTION, QUEUE)]


@pytest.mark.parametrize("content", [b"", b"anything else", b"\x01" * 5000])
def test_a_foreign_file_holds_nothing(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_holdings(path) == []


def test_without_a_file_nothing_is_held(path: Path) -> None:
    assert read_holdings(path) == []


def test_holdings_survive_the_kill_of_their_writer_at_any_moment(path: Path) -> None:
    """Each job that its writer said it had noted is there; what it wrote just then is whole."""
    script = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_holdings import Holdings, Kind, QUEUE, claim_of

        holdings = Holdings(Path({str(path)!r}), 64)
        for number in range(32):
            holdings.take(f"steady-{{number}}", Kind.CAPTION, QUEUE)
            holdings.claimed(claim_of(f"steady-{{number}}", token=f"{{number}}-t"))
        print("ready", flush=True)
        while True:
            for number in range(16):
                id = f"changing-{{number}}"
                holdings.take(id, Kind.CAPTION, QUEUE)
                holdings.asking(id, "nonce")
                holdings.claimed(claim_of(id))
                with holdings.decoding(id):
                    pass
                holdings.unclaimed(id)
                holdings.release(id)
    """
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            writer.send_signal(signal.SIGKILL)
        found = read_holdings(path)
        steady = {each.id: each for each in found if each.id.startswith("steady")}
        assert {id: each.token for id, each in steady.items()} == {
            f"steady-{number}": f"{number}-t" for number in range(32)
        }
        for each in found:
            assert (each.token is None) == (each.stage == "taken")


def test_a_disk_that_is_full_later_has_a_place_for_all_that_is_noted(path: Path) -> None:
    """Or a note would end its writer with SIGBUS, as if a picture had done it."""
    Holdings(path, places=100)
    found = path.stat()
    assert found.st_blocks * 512 >= found.st_size > 100 * 2048

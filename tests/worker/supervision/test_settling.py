"""What the death of a front means for each job that it held."""

import pytest

from blipq.contract import Kind
from blipq_worker.fronts.holdings import Holding, Stage
from blipq_worker.supervision.settling import verdicts

SEGFAULT, KILLED, HUNG, ENGINE_GONE, SHUT_DOWN, RAISED = -11, -9, 70, 75, 79, 1


def held(stage: Stage, *, solo: bool = False) -> Holding:
    token = None if stage == "taken" else "1-nonce"
    return Holding("job", Kind.CAPTION, "blipq.default.normal", token, solo, stage)


@pytest.mark.parametrize("code", [0, SEGFAULT, KILLED, HUNG, ENGINE_GONE, RAISED])
def test_a_message_that_was_only_taken_is_published_again(code: int) -> None:
    assert verdicts([held("taken")], code) == ["publish"]


@pytest.mark.parametrize("code", [SEGFAULT, -7, -6, -4, -8, HUNG])
def test_the_one_picture_that_was_decoded_when_the_decoder_failed_is_charged(code: int) -> None:
    assert verdicts([held("claimed"), held("decoding")], code) == ["lost", "crash"]


@pytest.mark.parametrize("code", [SEGFAULT, HUNG])
def test_of_several_pictures_none_is_charged_and_all_run_alone(code: int) -> None:
    assert verdicts([held("decoding")] * 3, code) == ["suspect"] * 3


@pytest.mark.parametrize("code", [SEGFAULT, HUNG])
def test_a_picture_that_fails_its_decoder_alone_is_invalid(code: int) -> None:
    assert verdicts([held("decoding", solo=True)], code) == ["image_invalid"]


@pytest.mark.parametrize("code", [KILLED, RAISED])
def test_a_death_that_is_not_the_decoders_makes_no_picture_invalid(code: int) -> None:
    holdings = [held("decoding"), held("claimed"), held("decoding", solo=True)]
    assert verdicts(holdings, code) == ["suspect", "lost", "crash"]


@pytest.mark.parametrize("code", [SEGFAULT, KILLED, HUNG, RAISED])
def test_a_job_that_ran_alone_is_to_blame(code: int) -> None:
    assert verdicts([held("claimed", solo=True)], code) == ["crash"]


@pytest.mark.parametrize("code", [0, ENGINE_GONE, SHUT_DOWN])
def test_a_front_that_ends_in_order_blames_nobody(code: int) -> None:
    """Who ran alone when the engine ended is not held any more: its lease runs out."""
    holdings = [held("claimed"), held("decoding"), held("claimed", solo=True)]
    assert verdicts(holdings, code) == ["hand-back"] * 3


@pytest.mark.parametrize("code", [0, SEGFAULT, KILLED, HUNG, ENGINE_GONE, SHUT_DOWN, RAISED])
def test_a_job_that_may_have_ended_its_engine_stays_suspect_however_its_front_ends(
    code: int,
) -> None:
    assert verdicts([held("claimed"), held("suspect")], code)[1] == "suspect"

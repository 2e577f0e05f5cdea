"""The guard of an upgrade: it passes a model that is unchanged, and no other one."""

import json
from math import inf
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from blipq.contract import (
    CaptionRequest,
    EmbedRequest,
    ErrorCode,
    Generation,
    ImageRef,
    IndexEntry,
    MatchRequest,
    SearchRequest,
)
from blipq.errors import InvalidRequest, TransientError
from blipq.images.decoding import DEFAULT_LIMITS
from blipq_worker import demo
from blipq_worker.blip2 import Blip2, FeatureCache, GenerateItem
from blipq_worker.catalog.models import ModelError
from blipq_worker.catalog.params import resolve
from blipq_worker.compare import run
from blipq_worker.compare.cases import SEED, Case, of_manifest, replayable
from blipq_worker.compare.difference import LIMIT_FEATURES, LIMIT_SINGLE, Comparison, distance
from blipq_worker.compare.pictures import Pictures
from blipq_worker.compare.replay import Observed, answered, answered_beside
from blipq_worker.compare.report import rendered
from blipq_worker.compare.run import OUTAGE, Guard
from blipq_worker.demo import world
from blipq_worker.engine.faults import DeviceLost
from worker.compare.candidates import (
    CASES,
    OPTIONS,
    Scenes,
    changed,
    copied,
    epsilon_of,
    guard,
    picture,
    scaled,
)

LAYERS = [
    ("opt", "vision_model.encoder.layers.1."),
    ("opt", "qformer.encoder.layer.2."),
    ("opt", "language_projection."),
    ("opt", "language_model.model.decoder.layers.0."),
    ("opt", "language_model.model.decoder.layers.3."),
    ("itm", "vision_model.encoder.layers.3."),
    ("itm", "qformer.encoder.layer.0."),
    ("itm", "itm_head."),
    ("itm", "text_projection."),
]


def farthest(comparison: Comparison) -> dict[str, float]:
    return {each.name: each.distance for each in comparison.farthest}


def test_an_unchanged_model_passes_twenty_times_of_twenty(tmp_path: Path) -> None:
    """Wherever its weights lie in the file, and so in memory."""
    guarding = guard(tmp_path / "pictures")
    for number in range(20):
        folder = tmp_path / str(number)
        what = changed(folder, ("opt", "itm")[number % 2], lambda weights: None, "." * number)
        comparison = guarding.compare("demo", what, CASES)
        assert not comparison.changed, (number, farthest(comparison))
        assert len(comparison.pairs) == len(CASES)


@pytest.mark.parametrize(("part", "layer"), LAYERS)
def test_one_layer_times_1_02_is_refused(tmp_path: Path, part: str, layer: str) -> None:
    what = changed(tmp_path / "candidate", part, scaled(layer, 1.02))
    comparison = guard(tmp_path / "pictures").compare("demo", what, CASES)
    assert all(pair.changed for pair in comparison.pairs), farthest(comparison)


@pytest.mark.parametrize("part", ["vision_config", "qformer_config"])
def test_another_epsilon_of_layer_norms_is_refused(tmp_path: Path, part: str) -> None:
    what = copied(tmp_path / "candidate", config=epsilon_of(part, 1e-5))
    comparison = guard(tmp_path / "pictures").compare("demo", what, CASES)
    assert all(pair.changed for pair in comparison.pairs), farthest(comparison)
    assert comparison.served.revision == comparison.candidate.revision, "its weights are the same"


def test_what_is_known_of_an_image_is_not_another_configurations(tmp_path: Path) -> None:
    """Models share one cache in a worker, and these have the same weights."""
    copied(tmp_path / "other", config=epsilon_of("vision_config", 1e-5))
    cache = FeatureCache(2**20)
    load = {"dtype": "float32", "cache": cache}
    one = Blip2.load(str(demo.OPT), **load)  # type: ignore[arg-type]
    other = Blip2.load(str(tmp_path / "other" / "opt"), **load)  # type: ignore[arg-type]
    assert one.info.revision == other.info.revision
    digest = "0" * 64
    image = one.preprocess(world.render(world.scene(7)), digest=digest)
    one.generate([GenerateItem(image, ("",), resolve("caption", one.info))])
    assert one.recall(digest, {"generation"}) is not None
    assert other.recall(digest, {"generation"}) is None


def test_a_candidate_that_lacks_a_part_has_no_answer(tmp_path: Path) -> None:
    comparison = guard(tmp_path / "pictures").compare("demo", str(demo.OPT), CASES)
    by_name = {pair.case.name: pair for pair in comparison.pairs}
    assert "model_unavailable" in (by_name["match"].failure or "")
    assert comparison.worst(1) == [by_name["match"]]
    assert by_name["caption"].changed, "a part of the model is missing"
    assert by_name["caption"].rewritten == 0


def test_pictures_that_are_gone_are_left_out_and_counted(tmp_path: Path) -> None:
    gone = Case("gone", CaptionRequest(image=picture(99)))
    comparison = guard(tmp_path / "pictures").compare("demo", "demo", [gone, *CASES])
    assert len(comparison.pairs) == len(CASES)
    (skipped,) = comparison.skipped
    assert skipped.name == "gone"
    assert "image_not_found" in skipped.why
    with pytest.raises(InvalidRequest, match="there is no job to replay: gone: image_not_found"):
        guard(tmp_path / "pictures").compare("demo", "demo", [gone])


def breaking(message: str) -> object:
    """A candidate that breaks with the job ``match``."""

    def answered(model: Blip2, case: Case, pictures: Pictures, other: Observed) -> Observed:
        if case.name == "match":
            raise RuntimeError(message)
        return answered_beside(model, case, pictures, other)

    return answered


def test_a_job_that_breaks_the_candidate_is_a_pair_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "answered_beside", breaking("mat1 and mat2\ncannot be multiplied"))
    comparison = guard(tmp_path / "pictures").compare("demo", "demo", CASES)
    by_name = {pair.case.name: pair for pair in comparison.pairs}
    assert by_name["match"].failure == "RuntimeError: mat1 and mat2 cannot be multiplied"
    assert comparison.failures == 1
    assert not by_name["caption"].changed
    assert not by_name["questions"].changed


def test_a_job_that_breaks_the_served_model_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Blip2, case: Case, pictures: Pictures) -> Observed:
        if case.name == "caption":
            raise RuntimeError("mat1 and mat2")
        return answered(model, case, pictures)

    monkeypatch.setattr(run, "answered", broken)
    comparison = guard(tmp_path / "pictures").compare("demo", "demo", CASES)
    assert [(each.name, each.why) for each in comparison.skipped] == [
        ("caption", "RuntimeError: mat1 and mat2")
    ]
    assert len(comparison.pairs) == len(CASES) - 1


def test_a_lost_device_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "answered_beside", breaking("CUDA error: an illegal memory access"))
    with pytest.raises(DeviceLost, match="lost with match"):
        guard(tmp_path / "pictures").compare("demo", "demo", CASES)


def test_pictures_beyond_the_bound_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = len(Scenes().fetch(picture(0)).data)
    monkeypatch.setattr("blipq_worker.compare.pictures.MOST_BYTES", first)
    comparison = guard(tmp_path / "pictures").compare("demo", "demo", CASES)
    assert [pair.case.name for pair in comparison.pairs] == ["caption"]
    assert {each.name for each in comparison.skipped} == {"questions", "match"}
    assert "image_too_large: the pictures before it take" in comparison.skipped[0].why


def test_pictures_that_cannot_be_kept_say_what_to_do(tmp_path: Path) -> None:
    guarding = guard(tmp_path / "pictures")
    (tmp_path / "pictures").rmdir()
    with pytest.raises(InvalidRequest, match=r"cannot be kept in .*: No such file.*TMPDIR"):
        guarding.compare("demo", "demo", CASES)


def test_a_candidate_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent"):
        guard(tmp_path / "pictures").compare("demo", str(tmp_path / "absent"), CASES)


def test_a_report_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    hostile = Case("<b>id", MatchRequest(image=picture(0), texts=("<script>x</script>",)))
    what = changed(tmp_path / "candidate", "itm", scaled("itm_head.", 1.5))
    guarding = guard(tmp_path / "pictures")
    comparison = guarding.compare("demo", what, [hostile])
    page = rendered(comparison, guarding.pictures)
    assert "1 of 1 jobs changed" in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<b>id" not in page
    assert 'src="data:image/jpeg;base64,' in page
    assert json.loads(json.dumps(comparison.as_dict(5), allow_nan=False))["changed"] is True


def test_numbers_that_cannot_be_compared_are_infinitely_far_apart() -> None:
    one = np.ones(3, dtype=np.float32)
    assert distance("image_embeds", one, one) == 0
    assert distance("image_embeds", one, 1.1 * one) == pytest.approx(0.1)
    assert distance("match logits", one, one + np.float32(0.5)) == 0.5
    for other in (None, np.ones(4, dtype=np.float32), one * np.nan, one * np.inf):
        assert distance("match logits", one, other) == inf
        assert distance("image_embeds", one, other) == inf
    assert LIMIT_FEATURES < LIMIT_SINGLE


def test_what_depends_on_more_than_the_model_is_taken_out_of_a_request() -> None:
    image = picture(0)
    indexed = EmbedRequest(image=image, index=IndexEntry(name="photos"))
    assert replayable(indexed) == EmbedRequest(image=image)
    by_text = replayable(SearchRequest(index="photos", text="a red circle"))
    assert by_text == EmbedRequest(mode="text", text="a red circle")
    assert replayable(SearchRequest(index="photos", image=image)) == EmbedRequest(image=image)
    drawn = replayable(CaptionRequest(image=image, generation=Generation(do_sample=True)))
    assert isinstance(drawn, CaptionRequest)
    assert drawn.generation is not None
    assert drawn.generation.seed == SEED
    own = CaptionRequest(image=image, generation=Generation(do_sample=True, seed=7))
    assert replayable(own) == own


def test_an_explained_match_is_replayed_for_its_scores_alone(tmp_path: Path) -> None:
    """Maps of two models differ by more than rounding where their scores do not."""
    match = MatchRequest(image=picture(2), texts=("a red circle",), explain=True)
    replayed = replayable(match)
    assert replayed == match.model_copy(update={"explain": False})
    what = copied(tmp_path / "candidate")
    case = Case("explained", replayed)
    (pair,) = guard(tmp_path / "pictures").compare("demo", what, [case]).pairs
    assert not pair.changed
    assert "0" not in pair.distances, "no map is compared"


def test_a_manifest_is_read_to_its_bound_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sample.jsonl"
    line = '{"custom_id": "%d", "kind": "caption", "image": "s3://scenes/%d.png"}\n'
    file.write_text("".join(line % (number, number) for number in range(3)))
    assert [case.name for case in of_manifest(file, 2)] == ["0", "1"]
    file.write_text(line % (1, 1) + '{"custom_id": "2", "kind": "caption"}\n')
    with pytest.raises(InvalidRequest, match=r"sample\.jsonl: line 2: .*image"):
        of_manifest(file, 5)


def test_a_store_that_is_away_ends_the_comparison_at_once(tmp_path: Path) -> None:
    class Away:
        """A store that answers nothing."""

        asked = 0

        def fetch(self, image: ImageRef) -> NoReturn:
            self.asked += 1
            raise TransientError(ErrorCode.IMAGE_UNAVAILABLE, "the store is away")

    away = Away()
    guarding = Guard(Pictures(away, DEFAULT_LIMITS, tmp_path), OPTIONS)  # type: ignore[arg-type]
    cases = [Case(str(number), CASES[0].request) for number in range(50)]
    with pytest.raises(TransientError, match="the store is away"):
        guarding.compare("demo", "demo", cases)
    assert away.asked <= 2 * OUTAGE

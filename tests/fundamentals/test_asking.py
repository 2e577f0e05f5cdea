"""Submit a job, get its result: what to ask about an image."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from benchmarks.heatmaps import cases, gain
from PIL import Image, ImageChops
from pytest_httpserver import HTTPServer

from blipq import Client, JobFailed, Settings
from blipq.images.heat import heat_of
from blipq.images.overlay import overlay
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq_worker.demo import world
from conftest import blipq
from fundamentals.pictures import png

pytestmark = pytest.mark.usefixtures("worker")


def test_submit_a_caption_and_get_it(client: Client, picture: bytes, scene: world.Scene) -> None:
    job = client.caption(picture)
    assert job.result(timeout=60).text == scene.caption
    assert job.status() == "succeeded"


def test_a_caption_can_go_on_from_a_prompt(client: Client, picture: bytes) -> None:
    result = client.caption(picture, "a photo of").result(timeout=60)
    assert len(result.captions) == 1


def test_the_best_of_several_captions_comes_first(client: Client, picture: bytes) -> None:
    captions = client.caption(picture, best_of=3).result(timeout=60).captions
    scores = [caption.score for caption in captions]
    assert len(captions) == 3
    assert scores == sorted(scores, reverse=True)
    matched = client.match(picture, [caption.text for caption in captions]).result(timeout=60)
    assert [scored.score for scored in matched.scores] == pytest.approx(scores, abs=1e-5)


def test_the_image_may_be_at_a_url(
    settings: Settings, picture: bytes, scene: world.Scene, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/scene.png").respond_with_data(picture)
    inside = settings.model_copy(update={"image_allow": ("127.0.0.1",)})  # https needs no setting
    with Client(inside) as client:
        job = client.caption(f"http://127.0.0.1:{httpserver.port}/scene.png")
        assert job.result(timeout=60).text == scene.caption


def test_ask_several_questions(client: Client, picture: bytes, scene: world.Scene) -> None:
    asked = scene.questions()[:3]
    result = client.vqa(picture, [each.question for each in asked]).result(timeout=60)
    assert [answer.question for answer in result.answers] == [each.question for each in asked]
    assert [answer.text for answer in result.answers] == [each.answer for each in asked]


def test_one_question_needs_no_list(client: Client, picture: bytes, scene: world.Scene) -> None:
    asked = scene.questions()[0]
    assert client.vqa(picture, asked.question).result(timeout=60).text == asked.answer


def test_choose_among_given_answers(client: Client, picture: bytes, scene: world.Scene) -> None:
    asked = next(each for each in scene.questions() if each.answer in world.COLORS)
    colors = list(world.COLORS)
    (answer,) = client.vqa(picture, asked.question, choices=colors).result(timeout=60).answers
    assert answer.text == asked.answer
    assert sum(choice.probability for choice in answer.choices) == pytest.approx(1)


def test_score_texts_by_probability(client: Client, picture: bytes, scene: world.Scene) -> None:
    wrong = scene.non_matching_texts(random.Random(1), 2)
    result = client.match(picture, [*wrong, scene.caption]).result(timeout=60)
    assert all(0 <= scored.score <= 1 for scored in result.scores)
    assert result.best.text == scene.caption


def test_score_texts_by_cosine(client: Client, picture: bytes, scene: world.Scene) -> None:
    wrong = scene.non_matching_texts(random.Random(1), 1)
    result = client.match(picture, [*wrong, scene.caption], head="itc").result(timeout=60)
    assert all(-1 <= scored.score <= 1 for scored in result.scores)


def test_features_of_an_image_and_of_texts_compare(
    client: Client, picture: bytes, scene: world.Scene
) -> None:
    """The best of an image's 32 rows against a text's first one: what an index of images holds."""
    image = client.embed(picture).result(timeout=60)["image_embeds_proj"].tolist()

    def cosine(text: str) -> float:
        features = client.embed(text=text).result(timeout=60)["text_embeds_proj"].tolist()
        return max(sum(a * b for a, b in zip(row, features[0], strict=True)) for row in image)

    texts = [scene.caption, *scene.non_matching_texts(random.Random(1), 1)]
    matched = client.match(picture, texts, head="itc").result(timeout=60)
    expected = [scored.score for scored in matched.scores]
    assert [cosine(text) for text in texts] == pytest.approx(expected, abs=5e-3)


def test_describe_an_image_at_one_look(client: Client, picture: bytes, scene: world.Scene) -> None:
    asked = scene.questions()[0]
    result = client.describe(
        picture, questions=asked.question, texts=scene.caption, embed=True
    ).result(timeout=60)
    assert result.caption.text == scene.caption
    assert result.vqa.text == asked.answer
    assert result.match.best.score > 0.5
    assert len(result.embed["image_embeds"].tolist()) == 32


def test_a_match_can_say_where_it_looked(client: Client) -> None:
    """On one of two shapes, at least twice its share of the picture."""
    case = next(each for each in cases(20) if each.text == "a red circle")
    matched = client.match(png(case.scene), case.text, explain=True).result(timeout=60)
    found = matched.best
    assert (found.score > 0.5, found.words) == (True, ("a", "red", "circle"))
    assert found.map is not None
    maps = np.asarray(found.map)
    assert (maps.shape, maps.max()) == ((4, 8, 8), 1.0)
    assert case.shape is not None
    assert gain(maps[0].astype(float), case.scene, case.shape) >= 2


def test_a_receipt_says_when_the_first_token_was_there(client: Client) -> None:
    """Since the job was submitted, as the client's patience counts."""
    picture = png(next(each for each in cases(20)).scene)
    info = client.caption(picture).wait(60)
    assert (receipt := info.receipt) is not None
    assert receipt.first_token_ms is not None
    took = (info.completed_at - info.created_at).total_seconds() * 1000
    assert receipt.queue_ms < receipt.first_token_ms <= took + 1
    matched = client.match(picture, "a cat").wait(60)
    assert matched.receipt.first_token_ms is None, "it writes nothing"


def test_where_it_looked_is_drawn_beside_the_output(client: Client) -> None:
    """A part of the PNG for each text: the picture in grey, under the colours of its map."""
    case = next(each for each in cases(20) if each.text == "a red circle")
    output = "s3://blipq-outputs/where.json"
    job = client.match(png(case.scene), [case.text, "a dog"], explain=True, output=output)
    found = job.result(timeout=60).scores
    data = client.storage.read("s3://blipq-outputs/where.json.heat.png")
    with Image.open(io.BytesIO(data)) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (1024, 512))
        parts = [drawn.crop((left, 0, left + 512, 512)) for left in (0, 512)]
    for part, scored in zip(parts, found, strict=True):
        assert scored.map is not None
        wanted = overlay(world.render(case.scene), heat_of(scored.map), part.size)
        apart = np.asarray(ImageChops.difference(part, wanted), dtype=float)
        assert apart.mean() < 4, "the model sees a smaller picture"


def test_the_command_line_draws_it_on_the_picture(
    client: Client, stack: LocalStack, tmp_path: Path
) -> None:
    case = next(each for each in cases(20) if each.text == "a red circle")
    local, drawn = tmp_path / "scene.png", tmp_path / "where.png"
    local.write_bytes(png(case.scene))
    for image in (str(local), client.storage.upload(local).uri):
        ran = blipq("explain", image, case.text, "--png", str(drawn), stack=stack)
        assert ran.returncode == 0, ran.stderr
        first, *grids = ran.stdout.splitlines()
        score, text = first.split("  ")
        assert (float(score) > 0.5, text) == (True, case.text)
        assert grids[1].split() == ["the", "whole", "text", "a", "red", "circle"]
        assert len(grids) == 2 + 8
        assert max(map(len, grids)) <= 80
        assert "█" in "".join(grids)
        with Image.open(drawn) as picture:
            assert (picture.format, max(picture.size)) == ("PNG", 1024)
        drawn.unlink()


def test_a_local_file_is_uploaded_first(client: Client, picture: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(picture)
    assert client.caption(path).result(timeout=60).text


def test_an_image_that_is_in_s3_is_only_named(client: Client, picture: bytes) -> None:
    uri = client.storage.upload(picture).uri
    assert client.caption(uri).result(timeout=60).text


def test_a_job_that_fails_says_why_and_whether_to_try_again(client: Client) -> None:
    job = client.caption("s3://blipq-inbox/no-such-picture.png")
    with pytest.raises(JobFailed) as raised:
        job.result(timeout=60)
    assert raised.value.code == "image_not_found"
    assert not raised.value.retryable
    assert job.status() == "failed"


def test_what_is_no_image_fails(client: Client) -> None:
    with pytest.raises(JobFailed, match="image_invalid"):
        client.caption(b"this is text").result(timeout=60)


def test_generation_parameters_have_hugging_faces_names(client: Client, picture: bytes) -> None:
    job = client.caption(picture, generation={"num_beams": 1, "max_new_tokens": 1})
    job.result(timeout=60)
    assert job.info().receipt.tokens == 1


def test_the_receipt_says_what_the_work_took(
    client: Client, picture: bytes, worker: Service
) -> None:
    job = client.caption(picture)
    job.result(timeout=60)
    receipt = job.info().receipt
    assert receipt.tokens > 0
    assert receipt.generate_ms > 0
    assert receipt.batch_size >= 1
    assert (receipt.dtype, receipt.quantization) == ("float32", "none")
    assert f"-{worker.pid}-" in receipt.worker


def test_an_image_is_looked_at_once(client: Client) -> None:
    """The second job about it needs no download, no decoding and no vision pass."""
    picture = png(world.scene(991))
    client.caption(picture).result(timeout=60)
    job = client.vqa(picture, "how many shapes are there?")
    job.result(timeout=60)
    receipt = job.info().receipt
    assert receipt.cache_hit
    assert receipt.vision_ms == 0
    assert receipt.decode_ms is None

"""Images into an index with `blipq index`, and found again by texts, as in the README."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blipq import Client, JobFailed
from blipq.local.stack import LocalStack
from blipq.local.supervisor import Service
from blipq_worker.blip2 import Blip2, EmbedItem
from blipq_worker.blip2.heads.matching import RerankItem
from blipq_worker.catalog.models import demo_folder
from blipq_worker.demo import world
from conftest import blipq
from renders import distinct_scenes, png, queries, upload

PREFIX = "s3://blipq-inbox/renders"
IMAGES, QUERIES, RERANK = 60, 8, 12


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return distinct_scenes(IMAGES)


@pytest.fixture(scope="module")
def indexed(
    stack: LocalStack, worker: Service, scenes: list[world.Scene]
) -> Iterator[dict[str, world.Scene]]:
    """The scenes by URI, in the index "renders"."""
    with Client(stack.settings()) as client:
        uris = upload(client, scenes, PREFIX)
        client.storage.put(f"{PREFIX}/notes.txt", b"no picture", content_type="text/plain")
        client.storage.put(f"{PREFIX}/broken.png", b"no picture", content_type="image/png")
    ran = blipq("index", f"{PREFIX}/", "--name", "renders", "--metadata", "by=me", stack=stack)
    assert ran.returncode == 3, ran.stderr
    assert ran.stdout == f"{IMAGES} indexed, 1 failed\n", ran.stderr
    assert "broken.png: image_invalid" in ran.stderr
    yield uris
    assert blipq("index", "delete", "renders", "--json", stack=stack).returncode == 0


def test_what_is_indexed_already_is_skipped(
    stack: LocalStack, client: Client, indexed: dict[str, world.Scene]
) -> None:
    changed, scene = next(iter(indexed.items()))
    client.storage.put(changed, png(scene) + b" ", content_type="image/png")
    ran = blipq("index", "--name", "renders", f"{PREFIX}/", "--json", stack=stack)
    tally = json.loads(ran.stdout)
    assert (tally["indexed"], tally["skipped"], tally["failed"]) == (1, IMAGES - 1, 1)


def test_texts_find_their_pictures_as_brute_force_does(
    client: Client, indexed: dict[str, world.Scene], scenes: list[world.Scene]
) -> None:
    """Cosines equal NumPy's, ranks those of the model asked by hand, and the pictures are right."""
    model = Blip2.load(str(demo_folder() / "opt"), str(demo_folder() / "itm"), dtype="float32")
    pixels = {uri: model.preprocess(world.render(scene)) for uri, scene in indexed.items()}
    embedded = model.embed([EmbedItem("image", each) for each in pixels.values()])
    vectors = np.stack([each["image_embeds_proj"] for each in embedded])
    right = {0: 0, RERANK: 0}
    for text, scene in queries(scenes, QUERIES).items():
        (asked,) = model.embed([EmbedItem("text", text=text)])
        expected = (vectors @ asked["text_embeds_proj"][0]).max(axis=1)
        near = [list(pixels)[number] for number in np.argsort(-expected)[:RERANK]]
        found = client.search("renders", text, rerank=0, top_k=RERANK).result(timeout=60)
        assert [hit.itc for hit in found.hits] == pytest.approx(
            np.sort(expected)[::-1][:RERANK].tolist(), abs=2e-3
        )
        logits = model.rerank([RerankItem(pixels[uri], text) for uri in near])
        scores = [
            logit + expected[list(pixels).index(uri)]
            for uri, (logit, _) in zip(near, logits, strict=True)
        ]
        again = client.search("renders", text, rerank=RERANK).result(timeout=60)
        assert again.hits[0].id == near[int(np.argmax(scores))]
        assert again.hits[0].itm == pytest.approx(logits[int(np.argmax(scores))][1], abs=1e-3)
        for rerank, hits in ((0, found.hits), (RERANK, again.hits)):
            right[rerank] += indexed[hits[0].id] is scene
    assert right[RERANK] >= right[0] >= 0.75 * QUERIES


def test_the_command_shows_hits_and_a_page_of_them(
    stack: LocalStack, indexed: dict[str, world.Scene], tmp_path: Path
) -> None:
    page = tmp_path / "hits.html"
    given = ("a red circle", "--name", "renders", "--filter", "by=me", "--top-k", "3")
    ran = blipq("search", *given, "--html", str(page), stack=stack)
    assert ran.returncode == 0, ran.stderr
    head, *lines = ran.stdout.splitlines()
    assert head == "  itm    itc  image"
    assert [line.endswith(".png  by=me") for line in lines] == [True] * 3
    assert page.read_text().count("data:image/jpeg;base64,") == 3


def test_an_image_finds_itself(client: Client, indexed: dict[str, world.Scene]) -> None:
    uri = list(indexed)[5]
    best, *_ = client.search("renders", image=uri, top_k=2).result(timeout=60).hits
    assert (best.id, best.itm) == (uri, None)
    assert best.itc == pytest.approx(1, abs=2e-3)


def test_indexes_are_listed_and_images_removed(
    stack: LocalStack, client: Client, indexed: dict[str, world.Scene]
) -> None:
    listed = blipq("index", "list", stack=stack).stdout
    assert "renders" in listed
    assert "demo" in listed
    gone = list(indexed)[7]
    blipq("index", "delete", "renders", "--id", gone, stack=stack)
    told = json.loads(blipq("index", "show", "renders", "--json", stack=stack).stdout)
    (shown,) = told["indexes"]
    assert shown["images"] == IMAGES - 1
    result = client.search("renders", indexed[gone].caption, top_k=IMAGES).result(timeout=60)
    assert gone not in {hit.id for hit in result.hits}
    ran = blipq("index", "show", "unknown", stack=stack)
    assert ran.returncode == 2
    assert ran.stderr.startswith("blipq: there is no index 'unknown'; there are: ")
    assert "renders" in ran.stderr
    assert "blipq index list" in ran.stderr.replace("\n", " ")


def test_a_search_of_an_unknown_index_says_so(client: Client, worker: Service) -> None:
    with pytest.raises(JobFailed, match="no index 'unknown'") as raised:
        client.search("unknown", "a cat").result(timeout=60)
    assert raised.value.code == "invalid_request"

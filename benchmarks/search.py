"""Search, measured: ``python benchmarks/search.py recall`` and ``... scale``.

recall: fresh pictures of the demo model's world are indexed by ``blipq index``, and texts that are
true of one of them only are searched for; all of it again by brute force in NumPy. scale: vectors
of many images that nobody drew, in S3 on this machine: time per query, bytes per image, and how
soon a fresh worker has opened the index.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from blipq import Client, Settings
from blipq.index.store import Entry, Index, Indexes, Space
from blipq.local.stack import LocalStack
from blipq_worker.blip2 import Blip2, EmbedItem, RerankItem
from blipq_worker.catalog.models import demo_folder
from blipq_worker.demo import world
from conftest import start_worker, wait_for_worker
from renders import distinct_scenes, queries, upload

PREFIX = "s3://blipq-inbox/renders"
RERANK = 128
SPACE = Space("nobody's", "0123456789abcdef")


def recall(images: int, texts: int) -> None:
    scenes = distinct_scenes(images)
    asked = queries(scenes, texts)
    with local_stack() as stack, Client(stack.settings()) as client:
        uris = upload(client, scenes, PREFIX)
        started = time.monotonic()
        command = [sys.executable, "-m", "blipq", "index", PREFIX, "--name", "renders"]
        subprocess.run(command, env={**os.environ, **stack.environment()}, check=True, timeout=3600)
        print(f"{images:,} images indexed in {time.monotonic() - started:.1f} s")
        found = {
            rerank: [
                client.search("renders", text, rerank=rerank, top_k=RERANK).result(timeout=600).hits
                for text in asked
            ]
            for rerank in (0, RERANK)
        }
    expected = brute_force(uris, list(asked))
    for rerank, name in ((0, "cosine"), (RERANK, "matching logit + cosine")):
        best = [hits[0].id for hits in found[rerank]]
        right = sum(uris[uri] is scene for uri, scene in zip(best, asked.values(), strict=True))
        brute = sum(
            uris[each[rerank][0]] is scene
            for each, scene in zip(expected, asked.values(), strict=True)
        )
        same = sum(uri == each[rerank][0] for uri, each in zip(best, expected, strict=True))
        print(
            f"by {name}: recall@1 {right / texts:.1%}, by brute force {brute / texts:.1%}; "
            f"the same best image for {same} of {texts} texts"
        )
    order = sum(
        {hit.id for hit in hits} == set(each[0][:RERANK])
        for hits, each in zip(found[0], expected, strict=True)
    )
    print(f"the same {RERANK} nearest images for {order} of {texts} texts")


def brute_force(uris: dict[str, world.Scene], texts: Sequence[str]) -> list[dict[int, list[str]]]:
    """The order of the images for each text: by cosine (0), and after re-ranking (RERANK)."""
    folder = demo_folder()
    model = Blip2.load(str(folder / "opt"), str(folder / "itm"), dtype="float32")
    pixels = {uri: model.preprocess(world.render(scene)) for uri, scene in uris.items()}
    names = list(pixels)
    vectors = np.stack(
        [
            each["image_embeds_proj"]
            for start in range(0, len(names), 64)
            for each in model.embed(
                [EmbedItem("image", pixels[uri]) for uri in names[start : start + 64]]
            )
        ]
    )
    orders = []
    for text in texts:
        (asked,) = model.embed([EmbedItem("text", text=text)])
        cosines = (vectors @ asked["text_embeds_proj"][0]).max(axis=1)
        near = np.argsort(-cosines)
        logits = model.rerank([RerankItem(pixels[names[n]], text) for n in near[:RERANK]])
        again = sorted(
            zip(near, logits, strict=False), key=lambda pair: -(pair[1][0] + cosines[pair[0]])
        )
        orders.append({0: [names[n] for n in near], RERANK: [names[n] for n, _ in again]})
    return orders


def scale(images: int, asked: int) -> None:
    with local_stack(worker=False) as stack:
        indexes = Indexes(stack.settings())
        index = indexes.open_or_create("scale", SPACE)
        vectors = np.concatenate(list(_filled(index, images)))
        report("read whole", index, vectors, asked)
        started = time.monotonic()
        index.compact()
        print(f"compacted and quantized in {time.monotonic() - started:.1f} s")
        report("quantized", index, vectors, asked)
        info = index.info()
        stored = _bytes(stack.settings())
        print(
            f"{info.bytes / images:,.0f} bytes of vectors per image; with the quantized copies, "
            f"and older versions that are kept for an hour, {stored / images:,.0f}"
        )
        code = (
            "import time, blipq_worker.app, blipq_worker.blip2\n"
            "from blipq import Settings\n"
            "from blipq.index.store import Indexes, Space\n"
            "started = time.monotonic()\n"
            f"index = Indexes(Settings()).open('scale', {SPACE!r})\n"
            "print(f'a fresh worker opens it in {time.monotonic() - started:.2f} s')"
        )
        environment = {**os.environ, **stack.environment()}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def _filled(index: Index, images: int) -> Iterator[Any]:
    """Vectors near one of 1,000 images each, so that there are near ones and far ones."""
    draw = np.random.default_rng(7)
    kinds = draw.standard_normal((1000, 32, 256), dtype=np.float32)
    started = time.monotonic()
    for start in range(0, images, 1000):
        drawn = kinds[draw.integers(0, 1000, 1000)]
        drawn = drawn + 0.7 * draw.standard_normal(drawn.shape, dtype=np.float32)
        drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
        rows = drawn.astype(np.float16)
        ids = [f"s3://nobody/{start + number:07}" for number in range(1000)]
        index.upsert([Entry(id, id, "", each) for id, each in zip(ids, rows, strict=True)])
        yield rows
    print(f"{images:,} images added in {time.monotonic() - started:.1f} s")


def report(what: str, index: Index, vectors: Any, asked: int) -> None:
    draw = np.random.default_rng(1)
    for name, rows, count in (("a text", 1, asked), ("an image", 32, max(1, asked // 10))):
        times, found, nearest = [], 0, 0
        for _ in range(count):
            query = vectors[draw.integers(len(vectors)), :rows].astype(np.float32)
            query += 0.05 * draw.standard_normal(query.shape, dtype=np.float32)
            query /= np.linalg.norm(query, axis=1, keepdims=True)
            started = time.monotonic()
            ids = [int(each.id[-7:]) for each in index.search(query, RERANK)]
            times.append(time.monotonic() - started)
            expected = np.argsort(-cosines(vectors, query))[:RERANK]
            found += len(set(ids) & set(expected.tolist()))
            nearest += ids[0] == expected[0]
        print(
            f"{what}, {name}: {1000 * statistics.median(times):.0f} ms (median of {count}), "
            f"{found / count / RERANK:.1%} of the {RERANK} nearest, "
            f"the nearest for {nearest} of {count}"
        )


def cosines(vectors: Any, query: Any) -> Any:
    """As the index has them, by brute force."""
    parts = [
        (chunk.astype(np.float32) @ query.T).max(axis=1).mean(axis=1)
        for chunk in np.array_split(vectors, max(1, len(vectors) // 1000))
    ]
    return np.concatenate(parts)


def _bytes(settings: Settings) -> int:
    with Client(settings) as client:
        pages = client.storage.client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket="blipq-indexes")
        return sum(each["Size"] for page in found for each in page.get("Contents", ()))


@contextmanager
def local_stack(*, worker: bool = True) -> Iterator[LocalStack]:
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder))
        stack.start()
        service = (
            start_worker(stack, Path(folder) / "worker.log", dtype="float32") if worker else None
        )
        try:
            if service is not None:
                wait_for_worker(service, stack.settings())
            yield stack
        finally:
            if service is not None:
                service.stop(timeout=30)
            stack.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, images, texts in (("recall", 1000, 100), ("scale", 20_000, 20)):
        command = commands.add_parser(name)
        command.add_argument("--images", type=int, default=images)
        command.add_argument("--queries", type=int, default=texts)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="lancedb fork support")  # programs, not forks
    {"recall": recall, "scale": scale}[arguments.command](arguments.images, arguments.queries)


if __name__ == "__main__":
    main()

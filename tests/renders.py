"""Pictures of the demo model's world, in S3, that their captions tell apart."""

import io
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from blipq import Client
from blipq_worker.demo import world


def distinct_scenes(count: int) -> list[world.Scene]:
    """Scenes that no model was trained on, no two with the same caption."""
    found: dict[str, world.Scene] = {}
    for scene in map(world.scene, itertools.islice(world.DEMO_SEEDS, 50 * count)):
        found.setdefault(scene.caption, scene)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"there are no {count} captions that differ")


def queries(scenes: Sequence[world.Scene], count: int) -> dict[str, world.Scene]:
    """Captions that are true of one of the scenes only, and of which."""
    found = {}
    for scene in scenes:
        if sum(world.is_true(scene.caption, other) for other in scenes) == 1:
            found[scene.caption] = scene
            if len(found) == count:
                return found
    raise ValueError(f"fewer than {count} captions name one scene")


def png(scene: world.Scene) -> bytes:
    """A scene drawn as a PNG file."""
    data = io.BytesIO()
    world.render(scene).save(data, "PNG")
    return data.getvalue()


def upload(client: Client, scenes: Sequence[world.Scene], prefix: str) -> dict[str, world.Scene]:
    """Puts the pictures under ``s3://bucket/prefix``; the scenes by URI."""
    uris = [f"{prefix}/{scene.seed}.png" for scene in scenes]

    def put(scene: world.Scene, uri: str) -> None:
        client.storage.put(uri, png(scene), content_type="image/png")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, scenes, uris))
    return dict(zip(uris, scenes, strict=True))

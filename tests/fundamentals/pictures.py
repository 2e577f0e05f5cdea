"""Pictures of the demo model's world as files."""

import io

from blipq_worker.demo import world


def png(scene: world.Scene) -> bytes:
    """A scene drawn as a PNG file."""
    data = io.BytesIO()
    world.render(scene).save(data, "PNG")
    return data.getvalue()

"""Tiny checkpoints, built once, and pictures to show them.

Torch is imported where a fixture needs it: most tests of the worker do without.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from blipq_worker.blip2 import Blip2


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the checkpoints ``opt``, ``t5`` and ``itm``."""
    import torch

    from worker.tiny_models import save_itm, save_opt, save_t5

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "opt": save_opt(folder / "opt"),
        "t5": save_t5(folder / "t5"),
        "itm": save_itm(folder / "itm"),
    }


@pytest.fixture(scope="session")
def opt(checkpoints: dict[str, Path]) -> "Blip2":
    """OPT and retrieval, in fp32."""
    from blipq_worker.blip2 import Blip2

    return Blip2.load(str(checkpoints["opt"]), str(checkpoints["itm"]), dtype="float32")


@pytest.fixture(scope="session")
def t5(checkpoints: dict[str, Path]) -> "Blip2":
    """T5 alone, in fp32."""
    from blipq_worker.blip2 import Blip2

    return Blip2.load(str(checkpoints["t5"]), dtype="float32")


@pytest.fixture(params=["opt", "t5"])
def either(request: pytest.FixtureRequest) -> "Blip2":
    """Each of the language model families in turn."""
    model: Blip2 = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def instructed_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny InstructBLIPs, by their language models ``t5`` and ``llama``."""
    import torch

    from worker.tiny_models import save_instructed_llama, save_instructed_t5

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("instructed")
    return {
        "t5": save_instructed_t5(folder / "t5"),
        "llama": save_instructed_llama(folder / "llama"),
    }


@pytest.fixture(scope="session")
def instructed_t5(instructed_checkpoints: dict[str, Path]) -> "Blip2":
    """InstructBLIP with a T5, in fp32."""
    from blipq_worker.blip2 import Blip2

    return Blip2.load(str(instructed_checkpoints["t5"]), dtype="float32")


@pytest.fixture(scope="session")
def instructed_llama(instructed_checkpoints: dict[str, Path]) -> "Blip2":
    """InstructBLIP with a Llama, in fp32."""
    from blipq_worker.blip2 import Blip2

    return Blip2.load(str(instructed_checkpoints["llama"]), dtype="float32")


@pytest.fixture(params=["instructed_t5", "instructed_llama"])
def instructed(request: pytest.FixtureRequest) -> "Blip2":
    """Each InstructBLIP in turn."""
    model: Blip2 = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Four pictures that differ a lot: noise, two colours, and a gradient."""
    noise = Image.frombytes("RGB", (40, 30), random.Random(1).randbytes(3600))
    gradient = Image.linear_gradient("L").convert("RGB").resize((50, 50))
    return [
        noise,
        Image.new("RGB", (33, 60), (200, 30, 30)),
        gradient,
        Image.new("RGB", (20, 20), (20, 40, 220)),
    ]

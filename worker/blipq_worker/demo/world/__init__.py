"""The world of the demo model: pictures of up to two coloured shapes, and what is true of them.

A scene is a background and up to two shapes on a grid of three rows and three columns. From a seed
follow the scene, its picture, its caption, its questions with their answers, and texts that match
it or do not. The same seed gives the same of all of them on every machine.
"""

from blipq_worker.demo.world.drawing import render
from blipq_worker.demo.world.scenes import (
    BACKGROUNDS,
    COLORS,
    DEMO_SEEDS,
    KINDS,
    NUMBERS,
    PLACES,
    QUESTION_KINDS,
    RELATIONS,
    TEST_SEEDS,
    TRAINING_SEEDS,
    VALIDATION_SEEDS,
    Demonstration,
    Empty,
    Mention,
    QuestionAnswer,
    Related,
    Scene,
    Shape,
    Statement,
    demonstration,
    is_true,
    parse,
    scene,
    with_article,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "DEMO_SEEDS",
    "KINDS",
    "NUMBERS",
    "PLACES",
    "QUESTION_KINDS",
    "RELATIONS",
    "TEST_SEEDS",
    "TRAINING_SEEDS",
    "VALIDATION_SEEDS",
    "Demonstration",
    "Empty",
    "Mention",
    "QuestionAnswer",
    "Related",
    "Scene",
    "Shape",
    "Statement",
    "demonstration",
    "is_true",
    "parse",
    "render",
    "scene",
    "with_article",
]

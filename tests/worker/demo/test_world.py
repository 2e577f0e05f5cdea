import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from blipq_worker.demo import world

SCENES = [world.scene(seed) for seed in range(1_500)]
TWO = [scene for scene in SCENES if len(scene.shapes) == 2]


def picture_bytes(seed: int) -> bytes:
    return world.render(world.scene(seed)).tobytes()


def every_statement() -> list[world.Statement]:
    names = [world.Mention(color, kind) for color in world.COLORS for kind in world.KINDS]
    placed = [
        world.Mention(name.color, name.kind, place) for name in names for place in world.PLACES
    ]
    related = [world.Related(a, r, b) for a in names for r in world.RELATIONS for b in names]
    return [*map(world.Empty, world.BACKGROUNDS), *names, *placed, *related]


def test_a_seed_gives_the_same_scene_texts_and_picture_every_time() -> None:
    for seed in range(20):
        assert world.scene(seed) == world.scene(seed)
        assert world.scene(seed).questions() == world.scene(seed).questions()
        assert world.demonstration(seed) == world.demonstration(seed)
        assert picture_bytes(seed) == picture_bytes(seed)


def test_seeds_differ() -> None:
    assert len({scene.caption for scene in SCENES}) > 500
    assert len({picture_bytes(seed) for seed in range(20)}) == 20


def test_the_seed_ranges_share_no_seed() -> None:
    ranges = [
        world.TRAINING_SEEDS,
        world.VALIDATION_SEEDS,
        world.TEST_SEEDS,
        world.DEMO_SEEDS,
    ]
    for earlier, later in itertools.pairwise(ranges):
        assert earlier.stop <= later.start


def test_at_least_a_third_of_the_scenes_have_two_shapes_and_some_have_none() -> None:
    counts = Counter(len(scene.shapes) for scene in SCENES)
    assert set(counts) == {0, 1, 2}
    assert counts[2] / len(SCENES) > 1 / 3
    assert 0.02 < counts[0] / len(SCENES) < 0.07


def test_every_value_occurs() -> None:
    shapes = [shape for scene in SCENES for shape in scene.shapes]
    assert {shape.kind for shape in shapes} == set(world.KINDS)
    assert {shape.color for shape in shapes} == set(world.COLORS)
    assert {shape.place for shape in shapes} == set(world.PLACES)
    assert {scene.background for scene in SCENES} == set(world.BACKGROUNDS)


def test_shapes_are_visible_apart_and_in_reading_order() -> None:
    for scene in SCENES:
        cells = [(shape.row, shape.column) for shape in scene.shapes]
        assert cells == sorted(set(cells))
        assert len({shape.name for shape in scene.shapes}) == len(scene.shapes)
        assert all(shape.color != scene.background for shape in scene.shapes)


@pytest.mark.parametrize(
    ("shapes", "caption"),
    [
        ([], "an empty gray background"),
        ([("circle", "red", 0, 0)], "a red circle in the top left"),
        ([("star", "orange", 1, 1)], "an orange star in the center"),
        (
            [("circle", "red", 0, 2), ("square", "orange", 2, 0)],
            "a red circle above an orange square",
        ),
        (
            [("circle", "red", 1, 0), ("square", "blue", 1, 2)],
            "a red circle to the left of a blue square",
        ),
    ],
)
def test_captions(shapes: list[tuple[str, str, int, int]], caption: str) -> None:
    scene = world.Scene(0, "gray", tuple(world.Shape(*shape) for shape in shapes))
    assert scene.caption == caption


def test_the_article_fits_the_word_after_it() -> None:
    for scene in SCENES:
        for text in [*scene.matching_texts(), *(asked.question for asked in scene.questions())]:
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_every_statement_is_read_as_it_is_written() -> None:
    for statement in every_statement():
        assert world.parse(statement.text) == statement


@pytest.mark.parametrize("text", ["", "a dog", "a red circle in the sky", "a red circle above"])
def test_other_texts_are_not_statements(text: str) -> None:
    with pytest.raises(ValueError, match="not a statement"):
        world.parse(text)


def test_truth_against_the_definition_for_every_statement() -> None:
    statements = every_statement()
    for scene in [*SCENES[:10], *(scene for scene in SCENES if not scene.shapes)][:12]:
        true = {statement.text for statement in statements if statement.holds(scene)}
        assert true == set(true_texts(scene))
        assert all(world.is_true(text, scene) for text in true)


def true_texts(scene: world.Scene) -> list[str]:
    """All texts that are true of a scene, from its cells alone."""
    if not scene.shapes:
        return [f"an empty {scene.background} background"]
    named = {world.with_article(f"{s.color} {s.kind}"): s for s in scene.shapes}
    texts = [*named, *(f"{name} in the {shape.place}" for name, shape in named.items())]
    for name, shape in named.items():
        for other_name, other in named.items():
            if shape.row < other.row:
                texts.append(f"{name} above {other_name}")
            if shape.column < other.column:
                texts.append(f"{name} to the left of {other_name}")
    return texts


def test_matching_texts_are_true_and_the_others_false() -> None:
    rng = random.Random(0)
    for scene in SCENES:
        matching = scene.matching_texts()
        assert matching[0] == scene.caption
        assert all(world.is_true(text, scene) for text in matching)
        assert not any(world.is_true(text, scene) for text in scene.non_matching_texts(rng, 2))
        assert not any(world.is_true(scene.one_attribute_change(rng, t), scene) for t in matching)


def test_one_attribute_changes_change_one_attribute() -> None:
    rng = random.Random(0)
    for scene in SCENES[:300]:
        changes = [text for texts in scene.statement.changes().values() for text in texts]
        assert scene.one_attribute_change(rng) in {change.text for change in changes}
        assert scene.statement not in changes


def test_every_attribute_is_changed_somewhere() -> None:
    attributes = {attribute for scene in SCENES for attribute in scene.statement.changes()}
    assert attributes == {"background", "color", "position", "relation", "shape"}


def test_every_kind_of_question_is_asked() -> None:
    asked = Counter(question.kind for scene in SCENES for question in scene.questions())
    assert set(asked) == set(world.QUESTION_KINDS)


def test_existence_is_as_often_so_as_not() -> None:
    answers = Counter(
        question.answer
        for scene in SCENES
        for question in scene.questions()
        if question.kind == "exist"
    )
    assert answers["yes"] / answers.total() == pytest.approx(0.5, abs=0.02)


def test_counts_cover_zero_one_and_two() -> None:
    answers = {q.answer for scene in SCENES for q in scene.questions() if "how many" in q.question}
    assert answers == set(world.NUMBERS)


def test_no_question_has_two_answers() -> None:
    for scene in SCENES:
        for asked in scene.questions():
            assert answers(asked.question, scene) == {asked.answer}


def answers(question: str, scene: world.Scene) -> set[str]:
    """Every answer that one could give, from the shapes alone."""
    words = question.rstrip("?").split()
    match words:
        case ["what", "color" | "colour", "is", "the", "background"]:
            return {scene.background}
        case ["what", "color" | "colour", "is", "the", kind]:
            return {shape.color for shape in scene.shapes if shape.kind == kind}
        case ["what" | "which", "shape", "is", color]:
            return {shape.kind for shape in scene.shapes if shape.color == color}
        case ["where", "is", "the", *name]:
            return {s.place for s in scene.shapes if {*name} <= {s.color, s.kind}}
        case ["is", "there", "a" | "an", color, kind]:
            return {"yes" if f"{color} {kind}" in {s.name for s in scene.shapes} else "no"}
        case ["how", "many", *noun, "are", "there"]:
            return {world.NUMBERS[sum(counted(noun, shape) for shape in scene.shapes)]}
    raise AssertionError(question)


def counted(noun: list[str], shape: world.Shape) -> bool:
    match noun:
        case ["shapes"]:
            return True
        case [color, "shapes"]:
            return shape.color == color
        case [plural]:
            return plural in {f"{shape.kind}s", f"{shape.kind}es"}
    raise AssertionError(noun)


def test_colors_are_asked_for_in_both_spellings() -> None:
    asked = " ".join(q.question for scene in SCENES for q in scene.questions())
    assert "what color is" in asked
    assert "what colour is" in asked


def test_pictures_are_square_and_of_many_sizes() -> None:
    pictures = [world.render(scene) for scene in SCENES[:100]]
    assert all(picture.mode == "RGB" for picture in pictures)
    assert all(picture.width == picture.height for picture in pictures)
    assert all(64 <= picture.width <= 224 for picture in pictures)
    assert len({picture.width for picture in pictures}) > 40


def test_a_shape_is_drawn_in_its_cell_in_its_color() -> None:
    scene = world.Scene(0, "white", (world.Shape("square", "blue", 2, 0),))
    pixels = np.asarray(world.render(scene).resize((100, 100)), dtype=int)
    red, _, blue = pixels[81, 19]
    assert blue - red > 100
    assert pixels[50, 50].min() > 200


def test_a_demonstration_asks_three_kinds_and_tells_true_from_false() -> None:
    for seed in range(300):
        shown = world.demonstration(seed)
        assert shown.caption == shown.scene.caption
        assert len({question.kind for question in shown.questions}) == 3
        assert set(shown.questions) <= set(shown.scene.questions())
        assert world.is_true(shown.matching_text, shown.scene)
        assert not world.is_true(shown.non_matching_text, shown.scene)
        assert shown.scene.seed in world.DEMO_SEEDS

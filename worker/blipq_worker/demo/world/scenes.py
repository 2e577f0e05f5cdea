"""Scenes, and what is true of them: captions, questions with their answers, and statements."""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, TypeVar

KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
BACKGROUNDS = ("white", "gray", "black", "beige")
PLACES = (
    *("top left", "top center", "top right"),
    *("middle left", "center", "middle right"),
    *("bottom left", "bottom center", "bottom right"),
)
NUMBERS = ("zero", "one", "two")
RELATIONS = ("above", "to the left of")
QUESTION_KINDS = ("color", "shape", "count", "exist", "where", "background")

TRAINING_SEEDS = range(1_000_000)
VALIDATION_SEEDS = range(1_000_000, 2_000_000)
TEST_SEEDS = range(2_000_000, 3_000_000)
DEMO_SEEDS = range(3_000_000, 2**31)

_SHAPE_COUNT_WEIGHTS = (4, 46, 50)
_UNSEEN = {("white", "white"), ("black", "black"), ("yellow", "beige")}


def with_article(noun_phrase: str) -> str:
    """The noun phrase after "a" or "an"."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


@dataclass(frozen=True)
class Shape:
    """One coloured shape in one cell of the grid."""

    kind: str
    color: str
    row: int
    column: int

    @property
    def place(self) -> str:
        """The name of its cell."""
        return PLACES[3 * self.row + self.column]

    @property
    def name(self) -> str:
        """Its colour and kind, which no other shape of the scene shares."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about one scene and its only right answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Empty:
    """The statement that there is nothing but the background."""

    background: str

    @property
    def text(self) -> str:
        return f"an empty {self.background} background"

    def holds(self, scene: "Scene") -> bool:
        """Whether it is true of the scene."""
        return not scene.shapes and scene.background == self.background

    def changes(self) -> dict[str, list["Statement"]]:
        """Every statement that differs in one attribute, by attribute."""
        return {"background": [Empty(other) for other in BACKGROUNDS if other != self.background]}


@dataclass(frozen=True)
class Mention:
    """The statement that a shape is there, or is there in a given place."""

    color: str
    kind: str
    place: str | None = None

    @property
    def text(self) -> str:
        named = with_article(f"{self.color} {self.kind}")
        return f"{named} in the {self.place}" if self.place else named

    def describes(self, shape: Shape) -> bool:
        """Whether the shape is the one mentioned."""
        named = (shape.color, shape.kind) == (self.color, self.kind)
        return named and self.place in (None, shape.place)

    def holds(self, scene: "Scene") -> bool:
        """Whether it is true of the scene."""
        return any(map(self.describes, scene.shapes))

    def changes(self) -> dict[str, list["Statement"]]:
        """Every statement that differs in one attribute, by attribute."""
        changed: dict[str, list[Statement]] = {
            "color": [replace(self, color=color) for color in COLORS if color != self.color],
            "shape": [replace(self, kind=kind) for kind in KINDS if kind != self.kind],
        }
        if self.place:
            changed["position"] = [replace(self, place=p) for p in PLACES if p != self.place]
        return changed


@dataclass(frozen=True)
class Related:
    """The statement that one shape is above, or to the left of, another."""

    first: Mention
    relation: str
    second: Mention

    @property
    def text(self) -> str:
        return f"{self.first.text} {self.relation} {self.second.text}"

    def holds(self, scene: "Scene") -> bool:
        """Whether it is true of the scene."""
        return any(
            self.first.describes(a) and self.second.describes(b) and self._related(a, b)
            for a in scene.shapes
            for b in scene.shapes
        )

    def _related(self, a: Shape, b: Shape) -> bool:
        return a.row < b.row if self.relation == "above" else a.column < b.column

    def changes(self) -> dict[str, list["Statement"]]:
        """Every statement that differs in one attribute, by attribute."""
        first, second = self.first.changes(), self.second.changes()
        changed: dict[str, list[Statement]] = {
            attribute: [
                *(Related(m, self.relation, self.second) for m in _mentions(first[attribute])),
                *(Related(self.first, self.relation, m) for m in _mentions(second[attribute])),
            ]
            for attribute in ("color", "shape")
        }
        changed["relation"] = [
            Related(self.second, self.relation, self.first),
            *(replace(self, relation=other) for other in RELATIONS if other != self.relation),
        ]
        return changed


Statement: TypeAlias = Empty | Mention | Related


def _mentions(statements: Iterable[Statement]) -> list[Mention]:
    return [statement for statement in statements if isinstance(statement, Mention)]


_NAMED = rf"an? ({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
_EMPTY_TEXT = re.compile(rf"an empty ({'|'.join(BACKGROUNDS)}) background")
_MENTION_TEXT = re.compile(rf"{_NAMED}(?: in the ({'|'.join(PLACES)}))?")
_RELATED_TEXT = re.compile(rf"{_NAMED} ({'|'.join(RELATIONS)}) {_NAMED}")


@lru_cache(maxsize=200_000)
def parse(text: str) -> Statement:
    """The statement that a text of this world makes; ValueError for any other text."""
    if found := _EMPTY_TEXT.fullmatch(text):
        return Empty(found[1])
    if found := _MENTION_TEXT.fullmatch(text):
        return Mention(found[1], found[2], found[3])
    if found := _RELATED_TEXT.fullmatch(text):
        return Related(Mention(found[1], found[2]), found[3], Mention(found[4], found[5]))
    raise ValueError(f"not a statement about this world: {text!r}")


def is_true(text: str, scene: "Scene") -> bool:
    """Whether the text is true of the scene."""
    return parse(text).holds(scene)


@dataclass(frozen=True)
class Scene:
    """What one picture shows; shapes are in reading order."""

    seed: int
    background: str
    shapes: tuple[Shape, ...]

    @property
    def statement(self) -> Statement:
        """All facts of the caption."""
        mentions = [Mention(shape.color, shape.kind) for shape in self.shapes]
        match self.shapes:
            case ():
                return Empty(self.background)
            case (only,):
                return replace(mentions[0], place=only.place)
            case (first, second):
                relation = RELATIONS[0] if first.row < second.row else RELATIONS[1]
                return Related(mentions[0], relation, mentions[1])
        raise AssertionError("a scene has at most two shapes")

    @property
    def caption(self) -> str:
        return self.statement.text

    def questions(self) -> list[QuestionAnswer]:
        """Questions of every kind that this scene can answer without ambiguity.

        As many existence questions have the answer "yes" as "no", except about an empty scene.
        """
        rng = random.Random(f"questions {self.seed}")
        return [
            *self._attribute_questions(rng),
            *self._count_questions(rng),
            *self._existence_questions(rng),
            *self._place_questions(),
            QuestionAnswer(
                "background", f"what {_spelling(rng)} is the background?", self.background
            ),
        ]

    def matching_texts(self) -> list[str]:
        """The caption first, then every shape alone, without and with its place."""
        parts = [
            Mention(shape.color, shape.kind, place).text
            for shape in self.shapes
            for place in (None, shape.place)
        ]
        return list(dict.fromkeys([self.caption, *parts]))

    def non_matching_texts(self, rng: random.Random, count: int = 1) -> list[str]:
        """Captions of other scenes that are false of this one."""
        return [
            _draw_until(lambda: _random_scene(rng).caption, lambda text: not is_true(text, self))
            for _ in range(count)
        ]

    def one_attribute_change(self, rng: random.Random, text: str | None = None) -> str:
        """A true text (the caption, if none is given) made false by changing one attribute.

        The attribute is one of colour, shape, position, relation or background, each as likely.
        """
        changed = parse(text or self.caption).changes()
        false = {
            attribute: texts
            for attribute, statements in changed.items()
            if (texts := [other.text for other in statements if not other.holds(self)])
        }
        return rng.choice(false[rng.choice(sorted(false))])

    def _unique(self, attribute: str) -> list[Shape]:
        """The shapes that this attribute alone identifies."""
        values = [getattr(shape, attribute) for shape in self.shapes]
        return [
            shape
            for shape, value in zip(self.shapes, values, strict=True)
            if values.count(value) == 1
        ]

    def _attribute_questions(self, rng: random.Random) -> list[QuestionAnswer]:
        colors = [
            QuestionAnswer("color", f"what {_spelling(rng)} is the {shape.kind}?", shape.color)
            for shape in self._unique("kind")
        ]
        kinds = [
            QuestionAnswer(
                "shape", f"{rng.choice(('what', 'which'))} shape is {shape.color}?", shape.kind
            )
            for shape in self._unique("color")
        ]
        return colors + kinds

    def _count_questions(self, rng: random.Random) -> list[QuestionAnswer]:
        kinds = _present_and_one_absent([shape.kind for shape in self.shapes], KINDS, rng)
        colors = _present_and_one_absent([shape.color for shape in self.shapes], COLORS, rng)
        counted = {
            "shapes": len(self.shapes),
            **{_plural(kind): number for kind, number in kinds.items()},
            **{f"{color} shapes": number for color, number in colors.items()},
        }
        return [
            QuestionAnswer("count", f"how many {noun} are there?", NUMBERS[number])
            for noun, number in counted.items()
        ]

    def _existence_questions(self, rng: random.Random) -> list[QuestionAnswer]:
        present = [Mention(shape.color, shape.kind) for shape in self.shapes]
        absent = [self._absent(mention, rng) for mention in present] or [_random_mention(rng)]
        return [
            QuestionAnswer("exist", f"is there {mention.text}?", answer)
            for answer, mentions in (("yes", present), ("no", absent))
            for mention in mentions
        ]

    def _absent(self, mention: Mention, rng: random.Random) -> Mention:
        """A shape that is not there: this one's colour or kind changed, or any other."""
        others = [
            Mention(color, kind)
            for color in {shape.color for shape in self.shapes}
            for kind in {shape.kind for shape in self.shapes}
        ]
        near = [m for m in (*others, *self._neighbours(mention)) if not m.holds(self)]
        swapped = [m for m in others if not m.holds(self)]
        pool = rng.choice([swapped or near, near, [self._any_absent(rng)]])
        return rng.choice(sorted(pool, key=lambda m: m.text))

    def _neighbours(self, mention: Mention) -> list[Mention]:
        return [m for statements in mention.changes().values() for m in _mentions(statements)]

    def _any_absent(self, rng: random.Random) -> Mention:
        return _draw_until(lambda: _random_mention(rng), lambda m: not m.holds(self))

    def _place_questions(self) -> list[QuestionAnswer]:
        by_kind = [(shape.kind, shape.place) for shape in self._unique("kind")]
        by_name = [(shape.name, shape.place) for shape in self.shapes]
        return [
            QuestionAnswer("where", f"where is the {name}?", place)
            for name, place in by_kind + by_name
        ]


_Drawn = TypeVar("_Drawn")


def _spelling(rng: random.Random) -> str:
    return rng.choice(("color", "colour"))


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _present_and_one_absent(
    present: list[str], all_values: tuple[str, ...], rng: random.Random
) -> dict[str, int]:
    absent = rng.choice([value for value in all_values if value not in present])
    return {value: present.count(value) for value in (*present, absent)}


def _draw_until(draw: Callable[[], _Drawn], accept: Callable[[_Drawn], bool]) -> _Drawn:
    while not accept(drawn := draw()):
        pass
    return drawn


def _random_mention(rng: random.Random) -> Mention:
    return Mention(rng.choice(COLORS), rng.choice(KINDS))


def scene(seed: int) -> Scene:
    return _random_scene(random.Random(f"scene {seed}"), seed)


def _random_scene(rng: random.Random, seed: int = -1) -> Scene:
    background = rng.choice(BACKGROUNDS)
    (count,) = rng.choices(range(3), _SHAPE_COUNT_WEIGHTS)
    visible = [
        (color, kind) for color in COLORS if (color, background) not in _UNSEEN for kind in KINDS
    ]
    cells = sorted(rng.sample(range(9), count))
    looks = rng.sample(visible, count)
    shapes = (
        Shape(kind, color, *divmod(cell, 3))
        for cell, (color, kind) in zip(cells, looks, strict=True)
    )
    return Scene(seed, background, tuple(shapes))


@dataclass(frozen=True)
class Demonstration:
    """One picture of a demo: a scene and the questions about it."""

    scene: Scene
    caption: str
    questions: tuple[QuestionAnswer, ...]
    matching_text: str
    non_matching_text: str


def demonstration(seed: int) -> Demonstration:
    """A scene that no model was trained on, with three questions of random, different kinds.

    An empty scene can answer questions of three kinds only and gets exactly those.
    """
    shown = scene(DEMO_SEEDS[seed % len(DEMO_SEEDS)])
    rng = random.Random(f"demonstration {seed}")
    possible = shown.questions()
    kinds = rng.sample(sorted({question.kind for question in possible}), 3)
    return Demonstration(
        scene=shown,
        caption=shown.caption,
        questions=tuple(rng.choice([q for q in possible if q.kind == kind]) for kind in kinds),
        matching_text=rng.choice(shown.matching_texts()),
        non_matching_text=shown.non_matching_texts(rng)[0],
    )

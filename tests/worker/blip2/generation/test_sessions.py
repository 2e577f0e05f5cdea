"""Items in flight say what each says alone, whoever comes, goes or fails beside them."""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from blipq.errors import PermanentError
from blipq_worker.blip2 import Blip2, GenerateItem, WritingSession
from blipq_worker.blip2.decoding.static import Way
from blipq_worker.blip2.decoding.static.attention.methods import MaskedAttention
from blipq_worker.blip2.generation import generator, sessions
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.engine.backend import Engine
from blipq_worker.inference.interface import ItemFailed
from conftest import wait_until
from worker.asking import Asking, texts_of

PROMPTS = ("", "a photo of", "Question: what is above the cat? Short answer:")


def item(model: Blip2, picture: Image.Image, *prompts: str, **overrides: Any) -> GenerateItem:
    params = resolve("caption", model.info, {"num_beams": 1, "max_new_tokens": 8, **overrides})
    return GenerateItem(model.preprocess(picture), prompts or PROMPTS, params)


def several(model: Blip2, pictures: list[Image.Image]) -> list[GenerateItem]:
    """Of all kinds: other limits, penalties, samples, beams, alternatives, numbers of prompts."""
    return [
        item(model, pictures[0]),
        item(model, pictures[1], "a photo of", max_new_tokens=3),
        item(model, pictures[2], repetition_penalty=1.4, max_new_tokens=12),
        item(model, pictures[3], do_sample=True, seed=4, num_return_sequences=3),
        item(model, pictures[0], "", min_new_tokens=5, no_repeat_ngram_size=1),
        item(model, pictures[1], do_sample=True, seed=5, temperature=3.0, top_k=0, top_p=1.0),
        item(model, pictures[3], num_beams=5, num_return_sequences=2),
        item(model, pictures[3], num_beams=4, num_return_sequences=2, do_sample=True, seed=6),
        item(model, pictures[0], "", num_beams=2, length_penalty=-1.0, repetition_penalty=1.3),
        replace(item(model, pictures[2]), prompts=()),
    ]


def texts(session: WritingSession, items: list[GenerateItem]) -> list[Any]:
    """Runs a session to its end."""
    tickets = {(0, number): each for number, each in enumerate(items)}
    for ticket, each in tickets.items():
        session.join(ticket, each)
    found: dict[Any, Any] = {}
    while len(found) < len(items):
        found.update(session.step([ticket for ticket in tickets if ticket not in found]))
    return [found[ticket] for ticket in tickets]


@pytest.fixture(params=["growing slots", "static slots"], autouse=True)
def kind_of_slots(request: pytest.FixtureRequest, opt: Blip2, t5: Blip2) -> Iterator[None]:
    """All that is said of sessions holds on CPUs and on GPUs."""
    if request.param == "static slots":
        for model in (opt, t5):
            open_static_slots(model)
    yield
    for model in (opt, t5):
        model.generator._static = None


def open_static_slots(model: Blip2, slots: int = 3) -> None:
    model.open_slots([Way(MaskedAttention, None)], slots=slots, budget=0)
    assert model.generator._static is not None


def with_slots(model: Blip2, slots: int) -> WritingSession:
    writer = model.generator
    if writer._static is not None:
        open_static_slots(model, slots)
        return writer.session()
    before, writer._slots = writer._slots, slots
    session = writer.session()
    writer._slots = before
    return session


def test_items_of_all_kinds_run_together_and_say_what_they_say_alone(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    items = several(either, pictures)
    alone = [either.generate([each])[0] for each in items]
    assert either.generate(items) == alone
    assert texts(with_slots(either, 2), items) == alone
    assert [len(prompts) for prompts in alone] == [3, 1, 3, 3, 1, 3, 3, 3, 1, 0]
    assert [len(alternatives) for alternatives in alone[3]] == [3, 3, 3]
    assert [len(alternatives) for alternatives in alone[6]] == [2, 2, 2]


def test_an_item_with_more_rows_than_slots_gets_them_one_by_one(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    many = item(either, pictures[0], *(f"a photo of {'red ' * count}" for count in range(20)))
    session = with_slots(either, 3)
    assert texts(session, [many])[0] == either.generate([many])[0]


def test_the_image_is_seen_once_and_only_when_its_turn_comes(
    opt: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    project = opt.generator.project

    def count(images: Any, adapters: Any = ()) -> torch.Tensor:
        seen.append(len(images))
        return project(images, adapters)

    monkeypatch.setattr(opt.generator, "project", count)
    session = with_slots(opt, 6)
    for number, picture in enumerate(pictures):
        session.join((0, number), item(opt, picture, min_new_tokens=8))
    session.step([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert seen == [2], "four rows may join, of two items"
    session.step([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert seen == [2], "two more rows, of items that were seen"
    session.step([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert seen == [2], "no slot is free"


def test_room_is_counted_in_the_slots_that_rows_will_take(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    """A search takes one slot where slots grow, and one for each of its beams elsewhere."""
    session = with_slots(opt, 6)
    session.join((1, 0), item(opt, pictures[0], "", num_beams=3))
    assert session.has_room((1, 1))
    session.join((1, 1), item(opt, pictures[1], "", num_beams=3))
    assert session.has_room((1, 2)) == (opt.generator._static is None)
    assert session.has_room((0, 3)), "a more urgent one waits for nobody"
    session.step([(1, 0), (1, 1)])
    assert session.has_room((1, 2)) == (opt.generator._static is None)
    session.leave((1, 0))
    assert session.has_room((1, 2))


def test_there_is_room_while_a_slot_is_free_that_nobody_more_urgent_waits_for(
    opt: Blip2, pictures: list[Image.Image]
) -> None:
    session = with_slots(opt, 4)
    session.join((1, 0), item(opt, pictures[0], "", min_new_tokens=8))
    session.step([(1, 0)])
    assert session.has_room((1, 1))
    session.join((1, 1), item(opt, pictures[0]))
    assert not session.has_room((1, 2))
    assert session.has_room((0, 3))
    session.leave((1, 1))
    assert session.has_room((1, 2))


def test_who_asks_a_full_session_for_room_looks_at_nobody(
    opt: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that wait ask before each step; with 128 slots this took longer than a GPU's step."""
    session = with_slots(opt, 4)
    for number in range(4):
        session.join((0, number), item(opt, pictures[0], "", min_new_tokens=8))
    session.step([(0, number) for number in range(4)])
    looked: list[int] = []
    monkeypatch.setattr(
        sessions._Writing, "waiting", property(lambda self: looked.append(1) or 0), raising=True
    )
    assert not any(session.has_room((priority, 9)) for priority in range(-3, 3))
    session.leave((0, 0))
    assert session.has_room((0, 9))
    assert looked == []


def test_a_model_can_be_asked_while_a_session_has_all_slots(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    """As its canary does, on the thread that would take the session's steps."""
    items = several(either, pictures)
    expected = either.generate(items)
    session = with_slots(either, 2)
    for number, each in enumerate(items):
        session.join((0, number), each)
    tickets = [(0, number) for number in range(len(items))]
    found = dict(session.step(tickets))
    assert either.generate(items) == expected
    while len(found) < len(items):
        found |= session.step([ticket for ticket in tickets if ticket not in found])
    assert [found[ticket] for ticket in tickets] == expected


def test_more_urgent_rows_get_their_slots_first(opt: Blip2, pictures: list[Image.Image]) -> None:
    session = with_slots(opt, 1)
    session.join((1, 0), item(opt, pictures[0], *PROMPTS))
    session.join((0, 1), item(opt, pictures[1], "a photo of"))
    order: list[Any] = []
    while len(order) < 2:
        left = [ticket for ticket in ((1, 0), (0, 1)) if ticket not in order]
        order += [ticket for ticket, _ in session.step(left)]
    assert order == [(0, 1), (1, 0)]


def test_who_leaves_makes_room_and_changes_nobody(
    either: Blip2, pictures: list[Image.Image]
) -> None:
    items = several(either, pictures)
    expected = [either.generate([each])[0] for each in items]
    session = with_slots(either, 5)
    tickets = {(0, number): each for number, each in enumerate(items)}
    for ticket, each in tickets.items():
        session.join(ticket, each)
    found: dict[Any, Any] = {}
    steps = 0
    while tickets.keys() - found.keys():
        found.update(session.step([ticket for ticket in tickets if ticket not in found]))
        steps += 1
        if steps == 3:
            for ticket in ((0, 0), (0, 3)):
                session.leave(ticket)
                del tickets[ticket]
    assert {number: found[0, number] for _, number in tickets} == {
        number: expected[number] for _, number in tickets
    }


def test_a_prompt_that_is_too_long_cannot_join(opt: Blip2, pictures: list[Image.Image]) -> None:
    session = with_slots(opt, 4)
    with pytest.raises(PermanentError, match="tokens, where this model has room"):
        session.join((0, 0), item(opt, pictures[0], "a photo of " * 1000))
    assert session.has_room((0, 1))


def test_unseeded_samples_differ(opt: Blip2, pictures: list[Image.Image]) -> None:
    wild = item(opt, pictures[0], "", do_sample=True, temperature=5.0, top_k=0, top_p=1.0)
    assert opt.generate([wild]) != opt.generate([wild])


# --- through the engine ---------------------------------------------------------------------------


@pytest.fixture
def engine(opt: Blip2, t5: Blip2) -> Iterator[Asking]:
    engine = Engine(
        {"opt": opt, "t5": t5}, max_batch_size=4, batch_wait_timeout_s=0, max_waiting=64
    )
    engine.batcher.start()
    yield Asking(engine)
    engine.batcher.close(timeout=30)


def test_both_models_and_beams_run_side_by_side(
    engine: Asking, opt: Blip2, t5: Blip2, pictures: list[Image.Image]
) -> None:
    models = {"opt": opt, "t5": t5}
    asked = [(name, each) for name, model in models.items() for each in several(model, pictures)]
    asked = [(name, each) for name, each in asked if each.prompts]  # the interface takes no other
    asked += [("opt", item(opt, picture, num_beams=2)) for picture in pictures]
    expected = [models[name].generate([each])[0] for name, each in asked]
    futures = [engine.send(each, name) for name, each in asked]
    for future, texts in zip(futures, expected, strict=True):
        answer = future.result(timeout=60)
        assert texts_of(answer) == texts
        assert answer.pass_ms > answer.vision_ms > 0
    assert max(future.result().batch_size for future in futures) > 1


def test_an_image_that_breaks_the_model_fails_alone(
    engine: Asking, opt: Blip2, pictures: list[Image.Image]
) -> None:
    good = [item(opt, picture) for picture in pictures]
    bad, broken = (
        replace(good[0], pixels=opt.preprocess(Image.new("RGB", (40, 30), color)))
        for color in ((0, 255, 0), (255, 0, 0))
    )
    expected = [opt.generate([each])[0] for each in good]

    def spoil(tower: Any, arguments: Any) -> Any:
        """A green image makes features that are no numbers, a red one raises."""
        (pixels,) = arguments
        plain = pixels.flatten(2).std(dim=2).amax(dim=1) < 1e-6
        red, green = (plain & (pixels[:, channel, 0, 0] > 1.9) for channel in (0, 1))
        if torch.any(red & ~green):
            raise ValueError("a red image")
        return (pixels.masked_fill((green & ~red)[:, None, None, None], float("nan")),)

    hook = opt.generator.model.vision_model.register_forward_pre_hook(spoil)
    try:
        futures = [engine.send(each, "opt") for each in [*good, bad, broken, *good]]
        for future, texts in zip(futures[:4] + futures[6:], expected * 2, strict=True):
            assert texts_of(future.result(timeout=60)) == texts
        for future in futures[4:6]:
            with pytest.raises(ItemFailed, match=r"not numbers|a red image"):
                future.result(timeout=60)
    finally:
        hook.remove()


@pytest.fixture
def slow_steps(opt: Blip2, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the language model's decode steps."""
    steps: list[int] = []
    first = opt.generator.model.language_model.model.decoder.layers[0].fc1
    forward = first.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(first, "forward", count)
    if opt.generator._static is not None:
        open_static_slots(opt)  # they call the layers that they found
        steps.clear()
    return steps


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cancelled_item_ends_at_the_next_step(
    engine: Asking, opt: Blip2, pictures: list[Image.Image], slow_steps: list[int], beams: int
) -> None:
    long = item(opt, pictures[0], "", num_beams=beams, min_new_tokens=90, max_new_tokens=90)
    future = engine.send(long, "opt")
    wait_until(lambda: len(slow_steps) > 3, "the first steps")
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(timeout=0)
    wait_until(lambda: engine.engine.batcher.stalled_for() == 0, "the end")
    assert len(slow_steps) < 90


def test_beams_that_nobody_waits_for_end_and_the_others_stay_as_they_are(
    either: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [item(either, picture, num_beams=3) for picture in pictures]
    expected = either.generate(batch)
    steps: list[int] = []
    monkeypatch.setattr(either.generator, "on_step", lambda: steps.append(1))
    said = either.generate(batch, lambda index: index != 1 or len(steps) < 3)
    assert [said[index] for index in (0, 2, 3)] == [expected[index] for index in (0, 2, 3)]
    all_steps = len(steps)
    steps.clear()
    either.generate(batch, lambda index: len(steps) < 3)
    assert len(steps) == 3 < all_steps


def test_sampled_beams_that_nobody_waits_for_end(
    either: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"num_beams": 3, "do_sample": True, "min_new_tokens": 8}
    batch = [item(either, picture, **long) for picture in pictures]
    steps: list[int] = []
    monkeypatch.setattr(either.generator, "on_step", lambda: steps.append(1))
    either.generate(batch, lambda index: index != 1 or len(steps) < 3)
    all_steps = len(steps)
    steps.clear()
    either.generate(batch, lambda index: len(steps) < 3)
    assert len(steps) == 3 < all_steps


@pytest.mark.parametrize("beams", [1, 3])
def test_one_item_that_does_not_fit_into_memory_at_once_is_split(
    either: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    many = item(either, pictures[0], *PROMPTS, *PROMPTS, num_beams=beams)
    expected = either.generate([many])
    head = either.generator.model.language_model.lm_head

    def small(inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() // inputs.shape[-1] > 3:
            raise torch.OutOfMemoryError("more than three rows")
        return torch.nn.functional.linear(inputs, head.weight, head.bias)

    monkeypatch.setattr(head, "forward", small)
    assert either.generate([many]) == expected


def test_what_does_not_fit_keeps_only_its_like_waiting(
    opt: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen beams leave no room for sixteen more in three slots, but for greedy texts."""
    monkeypatch.setattr(generator, "_LONG_SLOTS", 3)  # with static slots
    session = with_slots(opt, 3)
    wide = item(opt, pictures[0], "", num_beams=16, min_new_tokens=8)
    waits, greedy = item(opt, pictures[1], "", num_beams=16), item(opt, pictures[2], "")
    for number, each in enumerate((wide, waits, greedy)):
        session.join((0, number), each)
    tickets = [(0, 0), (0, 1), (0, 2)]
    session.step(tickets)
    joined = [[row.joined for row in session._items[ticket].rows] for ticket in tickets]
    assert joined == [[True], [False], [True]]


def test_searches_too_long_for_static_slots_take_no_room_of_short_ones(
    t5: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they keep their images from being seen, however many of them wait."""
    monkeypatch.setattr(generator, "_LONG_SLOTS", 1)
    monkeypatch.setattr(sessions, "JOINING_ON_A_CPU", 2)
    open_static_slots(t5, 6)
    session = t5.generator.session()
    long = item(t5, pictures[0], "", num_beams=5, max_new_tokens=400, min_new_tokens=400)
    for number in range(3):
        session.join((0, number), long)
    assert session.has_room((0, 3))
    session.join((0, 3), item(t5, pictures[1], "", max_new_tokens=1))
    done: list[Any] = []
    for _ in range(3):
        waiting = [(0, number) for number in range(4) if (0, number) not in done]
        done += [ticket for ticket, _ in session.step(waiting)]
    assert done == [(0, 3)]


def test_long_searches_wait_for_their_own_memory_and_short_texts_for_none_of_it(
    t5: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that waited held a static slot, until no short text got one; and all seemed to run."""
    monkeypatch.setattr(generator, "_LONG_SLOTS", 8)
    open_static_slots(t5, 4)
    begun: list[Any] = []
    engine = Asking(
        Engine(
            {"default": t5},
            max_batch_size=4,
            batch_wait_timeout_s=0,
            max_waiting=64,
            on_start=begun.extend,
        )
    )
    # Each takes memory for five slots: of two the second is the next.
    wide = item(t5, pictures[0], "", num_beams=5, max_new_tokens=200, min_new_tokens=200)
    waiting = [engine.send(replace(wide, prompts=("a" * number,))) for number in range(6)]
    short = [engine.send(item(t5, picture, "", max_new_tokens=2)) for picture in pictures]
    engine.engine.batcher.start()
    try:
        for future in short:
            future.result(timeout=60)
        assert len(begun) == len(short) + 2
        assert not any(future.done() for future in waiting)
    finally:
        for future in waiting:
            future.cancel()
        engine.engine.batcher.close(timeout=30)


def test_a_prompt_is_short_or_long_by_its_tokens(t5: Blip2, opt: Blip2) -> None:
    for model in (t5, opt):
        open_static_slots(model, 4)
        is_long = model.generator.is_long
        params = resolve("caption", model.info, {"num_beams": 4, "max_new_tokens": 20})
        assert not is_long((), params)
        assert not is_long(("a red circle", ""), params)
        assert not is_long(("a " * 20,), params), "its characters could be as many tokens"
        assert is_long(("a red circle", "a " * 210), params)
        assert is_long(
            ("",), resolve("caption", model.info, {"num_beams": 1, "max_new_tokens": 400})
        )
        assert is_long(("",), resolve("caption", model.info, {"num_beams": 5}))
        model.generator._static = None
        assert not is_long(("a " * 210,), params), "all slots grow"


def test_an_ordinary_question_is_short_without_a_tokenizer(
    opt: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prompt: str) -> list[int]:
        raise AssertionError(f"a tokenizer for {prompt!r}")

    open_static_slots(opt, 5)
    monkeypatch.setattr(opt.generator, "ids", refuse)
    params = resolve("vqa", opt.info)
    prompt = vqa_prompt("what is the man holding in his hands?")
    assert not opt.generator.is_long((prompt,), params)
    with pytest.raises(AssertionError, match="a tokenizer"):
        opt.generator.is_long(("é" * 150,), params)
    opt.generator._static = None


def test_where_most_slots_are_taken_rows_join_in_groups(
    opt: Blip2, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over one image costs nearly as much as one over many."""
    monkeypatch.setattr(sessions, "JOINING_ON_A_CPU", 4)
    seen: list[int] = []
    project = opt.generator.project

    def count(images: Any, adapters: Any = ()) -> torch.Tensor:
        seen.append(len(images))
        return project(images, adapters)

    monkeypatch.setattr(opt.generator, "project", count)
    items = [
        item(opt, pictures[0], "", min_new_tokens=length, max_new_tokens=length)
        for length in (6, 7, 9, 9, 2, 2)
    ]
    assert len(texts(with_slots(opt, 4), items)) == 6
    assert seen == [4, 2], "the fifth waited for the sixth"

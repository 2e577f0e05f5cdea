"""What decoding asks of a GPU, counted without one; and what it does when that fails."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import (
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.cuda.capture import Run
from blipq_worker.blip2.decoding import DecodeLoop, Row
from blipq_worker.blip2.decoding.static import StaticLoop, Way, static_loop
from blipq_worker.blip2.decoding.static.attention import kernel as kernel_module
from blipq_worker.blip2.decoding.static.attention.methods import KernelAttention, MaskedAttention
from blipq_worker.blip2.decoding.static.llama import StaticLlama
from blipq_worker.blip2.decoding.static.opt import StaticOpt
from blipq_worker.blip2.decoding.static.sampler import Sampler, Variant
from blipq_worker.blip2.decoding.static.state import SlotState
from blipq_worker.blip2.decoding.static.step import Shape, StaticStep
from blipq_worker.blip2.decoding.static.t5 import StaticT5
from blipq_worker.engine.faults import is_device_fault
from blipq_worker.inference.requests import GenerationParams
from blipq_worker.serving.footprint import config_of
from worker.card import Card, out_of_memory
from worker.in_flight import GREEDY, SAMPLED, every_penalty

EAGER = Way(MaskedAttention, None)
BEAMS = GenerationParams(num_beams=3, max_new_tokens=6, min_new_tokens=6)
META = torch.device("meta")


# --- the counter ----------------------------------------------------------------------------------


def of_host(numbers: torch.Tensor) -> torch.Tensor:
    """Memory into which a card copies while the host goes on."""
    return torch.empty(numbers.shape, pin_memory=False)


@pytest.mark.parametrize(
    ("run", "launches", "waits"),
    [
        (lambda x: x.view(2, 8)[:, 1:].transpose(0, 1).unsqueeze(0), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: (x + 1) * 2, 2, 0),
        (lambda x: x.add_(1).mul_(2), 2, 0),
        (lambda x: x.t().reshape(16), 1, 0),
        (lambda x: x.reshape(16), 0, 0),
        (lambda x: x.softmax(-1), 1, 0),
        (lambda x: torch.nn.functional.linear(x, x, x[0]), 1, 0),
        (lambda x: torch.nn.functional.rms_norm(x, (4,), x[0]), 1, 0),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(*[x[None, None]] * 3), 1, 0),
        (lambda x: x.masked_fill(x > 0, 0.0), 2, 0),
        (lambda x: x[0, 0].item(), 0, 1),
        (lambda x: bool(x[0, 0]), 0, 1),
        (lambda x: x.tolist(), 0, 1),
        (lambda x: x.cpu(), 0, 1),
        (lambda x: x[x > 0], 2, 1),
        (lambda x: x.nonzero(), 1, 1),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, 1),
        (lambda x: torch.tensor([]), 0, 0),
        (lambda x: of_host(x).copy_(x, non_blocking=True).tolist(), 0, 0),
        (lambda x: of_host(x).copy_(x).tolist(), 0, 1),
    ],
)
def test_what_is_launched_and_waited_for_is_known(run: Any, launches: int, waits: int) -> None:
    with torch.inference_mode():
        numbers = torch.arange(16.0).view(4, 4)
        with Card() as card:
            run(numbers)
    assert (card.launched, len(card.waits)) == (launches, waits), card.launches


def test_a_card_runs_out_of_memory_once_and_a_dead_one_stays_dead() -> None:
    numbers = torch.ones(4)
    with Card() as card:
        card.run_out_of_memory(after=1)
        numbers.add_(1)
        numbers + 1
        with pytest.raises(torch.OutOfMemoryError):
            numbers + 1
        numbers + 1
        card.die(after=1)
        numbers.add_(1)
        for run in (lambda: numbers.add_(1), lambda: numbers.view(2, 2), lambda: numbers.tolist()):
            with pytest.raises(torch.AcceleratorError):
                run()


def deep_opt(layers: int = 32) -> Any:
    """As deep as OPT-2.7b, and narrow."""
    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=300,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=512,
        dropout=0.0,
        init_std=0.3,
    )
    return OPTForCausalLM(config).eval().requires_grad_(False)


def deep_t5(layers: int = 24) -> Any:
    """As deep as Flan-T5-XL, and narrow."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=300,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        initializer_factor=2.0,
    )
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def some_rows(model: Any, params: Sequence[GenerationParams]) -> list[Row]:
    dice, numbers = random.Random(4), torch.Generator().manual_seed(4)
    width = model.get_input_embeddings().weight.shape[1]
    return [
        Row(
            torch.randn(32, width, generator=numbers),
            [dice.randrange(4, 300) for _ in range(dice.randrange(1, 9))],
            each,
            dice.getrandbits(62),
        )
        for each in params
    ]


def test_growing_slots_launch_and_wait_as_they_were_seen_to_on_a_card() -> None:
    """An H100 was given 542 kernels and waited for 7 times in a step of 32, at 68de1d4."""
    model = deep_opt()
    loop = DecodeLoop(model, ends=(2,), slots=8)
    running = loop.join(some_rows(model, [replace(GREEDY, min_new_tokens=4)] * 4))
    loop.step(running)
    with Card() as card:
        loop.step(running)
    assert 500 <= card.launched <= 545
    assert 5 <= len(card.waits) <= 8


# --- a step in static slots -----------------------------------------------------------------------


class _Launches:
    """Stands in for the kernel: counts how often it is launched."""

    def __init__(self) -> None:
        self.number = 0

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.number += 1

        return launch


def published(name: str, dtype: torch.dtype) -> Any:
    """A published language model's layers in full size, as shapes alone."""
    config = config_of(f"Salesforce/{name}").text_config
    kinds = {"opt": OPTForCausalLM, "llama": LlamaForCausalLM, "t5": T5ForConditionalGeneration}
    kind: Any = kinds[config.model_type]
    if kind is T5ForConditionalGeneration:
        config.decoder_start_token_id = 0
    with META:
        return kind(config).to(dtype).eval()


#: A published model, what runs it, and the most kernels of a greedy step.
PUBLISHED = [
    ("blip2-opt-2.7b", StaticOpt, torch.float16, 470),
    ("instructblip-vicuna-7b", StaticLlama, torch.float16, 700),
    ("blip2-flan-t5-xl", StaticT5, torch.bfloat16, 700),
]


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda each: each[0])
def language(request: pytest.FixtureRequest) -> Any:
    name, kind, dtype, most = request.param
    with META:
        made: Any = kind(published(name, dtype))
    with torch.inference_mode():
        made.reserve(32, 256, META)
    made.most = most
    return made


def step_on_meta(language: Any, attention: Any) -> StaticStep:
    state = SlotState.empty(32, 256, language.vocabulary, META)
    sampler = Sampler((2, 5), language.start, language.vocabulary, META)
    return StaticStep(language, sampler, state, attention)


@pytest.mark.parametrize(
    ("variant", "more"),
    [
        (Variant(), 0),
        (Variant(False, 64), 85),
        (Variant(True, 1024), 125),
        (Variant(beams=5), 150),
        (Variant(True, 1024, 16), 390),
    ],
)
@torch.inference_mode()
def test_a_static_step_waits_for_nothing_and_launches_little(
    language: Any, variant: Variant, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernel = _Launches()
    monkeypatch.setattr(kernel_module, "_attend", by_kernel)
    for attention in (MaskedAttention(), KernelAttention()):
        step = step_on_meta(language, attention)
        by_kernel.number = 0
        with Card() as card:
            step(Shape(32, 64, variant))
        assert card.waits == []
        assert card.sent == 0
        assert card.launched + by_kernel.number <= language.most + more
    assert by_kernel.number > 0


# --- no memory ------------------------------------------------------------------------------------


def of_all_kinds() -> list[GenerationParams]:
    penalized = replace(SAMPLED, repetition_penalty=1.3, no_repeat_ngram_size=2)
    kinds = [*every_penalty(4), replace(SAMPLED, top_k=0, top_p=0.9), penalized]
    shorter = replace(BEAMS, num_beams=2, max_new_tokens=4, min_new_tokens=0)
    drawn = replace(penalized, num_beams=2, top_k=3)
    return [*kinds, BEAMS, shorter, drawn, BEAMS]


def said(some: Sequence[Row]) -> list[list[list[int]]]:
    return [row.alternatives for row in some]


def anew(some: Sequence[Row]) -> list[Row]:
    return [Row(row.queries, row.ids, row.params, row.seed) for row in some]


def to_their_ends(loop: Any, some: Sequence[Row], attempt: Any) -> None:
    """Runs rows two by two, some of them held now and then; ``attempt`` makes each call."""
    todo, dice = list(some), random.Random(5)
    for _ in range(100):
        if not todo and not loop.running:
            return
        coming, todo = todo[:2], todo[2:]
        if coming:
            attempt(partial(loop.join, coming))
        going = [row for row in loop.running if not row.ended and dice.random() < 0.8]
        if going:
            attempt(partial(loop.step, going))
        attempt(partial(loop.leave, [row for row in loop.running if row.ended]))
    raise AssertionError("they have not come to their ends")


class Short:
    """Makes calls on a card that runs out of memory in some places of each, one after the other."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.failed = 0

    def __call__(self, run: Callable[[], object]) -> None:
        """Each try comes farther than the last, until one comes to its end."""
        place = self._dice.randrange(8)
        while True:
            with Card() as card:
                card.run_out_of_memory(after=place)
                try:
                    run()
                except torch.OutOfMemoryError:
                    self.failed += 1
                    place += self._dice.randint(1, 40)
                else:
                    return


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("make", [deep_opt, deep_t5])
def test_where_memory_runs_out_a_call_can_be_made_again(make: Any, kind: str, seed: int) -> None:
    """Wherever in a join, a step or a leave that is: it is as if the call had never been made.

    A static step wrote some of its state before it was sure of the rest, and took another token
    for one that it had written; beams and sequences forgot that they ran.
    """
    model = make(layers=2)
    some = some_rows(model, of_all_kinds())
    expected, short = anew(some), Short(seed)
    to_their_ends(loop_of(model, kind), expected, lambda run: run())
    to_their_ends(loop_of(model, kind), some, short)
    assert said(some) == said(expected)
    assert short.failed > 100


#: For all of these at once, in static slots, too.
SLOTS = sum(params.num_beams for params in of_all_kinds())


def loop_of(model: Any, kind: str) -> Any:
    if kind == "growing":
        return DecodeLoop(model, ends=(2, 7), slots=SLOTS)
    loop = static_loop(model, ends=(2, 7), slots=SLOTS, budget=0, among=[EAGER])
    assert isinstance(loop, StaticLoop)
    return loop


# --- a whole loop in static slots -----------------------------------------------------------------


class Watched:
    """Makes the calls of a loop on a card, and sees that none waits.

    most: kernels of the call that launched most, by its name.
    """

    def __init__(self, loop: Any, card: Card) -> None:
        self._loop, self._card = loop, card
        self._run, self._in_step = loop._run, 0
        loop._run = self._step
        self.most: dict[str, int] = {"join": 0, "step": 0, "leave": 0}

    def __call__(self, name: str, rows: Sequence[Row]) -> None:
        card = self._card
        launched, fetched, read = card.launched, card.fetched, len(card.behind)
        sent, ending = card.sent, sum(row.has_beams and not row.ended for row in rows)
        self._in_step = 0
        with card:
            getattr(self._loop, name)(rows)
        took = card.launched - launched
        self.most[name] = max(self.most[name], took)
        assert card.waits == [], (name, card.waits)
        # One table of each kind that joins; in a step, which searches have ended; who leaves.
        most_sent = {"join": 2, "step": min(1, ending), "leave": 1}[name]
        assert card.sent - sent <= most_sent, name
        # Tokens, and texts of searches that have ended.
        assert card.fetched - fetched <= 2, name
        # What the host waits for was launched before the step, which the device goes on with. Who
        # joins or leaves makes it wait for nothing.
        reads = card.behind[read:]
        assert all(behind >= self._in_step for behind in reads) if name == "step" else not reads

    def _step(self, shape: Shape) -> None:
        launched = self._card.launched
        self._run(shape)
        self._in_step = self._card.launched - launched


def by_threes(loop: Any, some: Sequence[Row], call: Callable[[str, list[Row]], object]) -> None:
    """Runs rows to their ends, three joining at a time; ``call`` makes the loop's calls by name."""
    todo = list(some)
    while todo or loop.running:
        coming, todo = todo[:3], todo[3:]
        if coming:
            call("join", coming)
        call("step", [row for row in loop.running if not row.ended])
        call("leave", [row for row in loop.running if row.ended])


def run_watched(loop: Any, some: Sequence[Row], card: Card) -> Watched:
    watched = Watched(loop, card)
    by_threes(loop, some, watched)
    return watched


def lengths(*numbers: int) -> list[GenerationParams]:
    return [replace(GREEDY, max_new_tokens=each, min_new_tokens=2) for each in numbers]


@pytest.mark.parametrize(
    ("kinds", "most"),
    [
        (partial(lengths, 9, 3, 5, 7, 4), 160),
        (lambda: [BEAMS, replace(BEAMS, num_beams=5, num_return_sequences=2)], 320),
        (of_all_kinds, 600),
    ],
    ids=["greedy", "beams", "all kinds"],
)
@pytest.mark.parametrize("make", [deep_opt, deep_t5])
def test_a_whole_loop_waits_for_nothing_that_it_has_just_launched(
    make: Any, kinds: Callable[[], list[GenerationParams]], most: int
) -> None:
    """From the first sequence that joins to the last that leaves: what the host does between
    passes counts, too.
    """
    model = make(layers=6)
    watched = run_watched(loop_of(model, "static"), some_rows(model, kinds()), Card())
    assert 100 < watched.most["step"] <= most
    assert 0 < watched.most["leave"] <= 5


@pytest.mark.parametrize("make", [deep_opt, deep_t5])
def test_a_whole_loop_in_graphs_launches_one_a_step(make: Any) -> None:
    """And beside it what brings the texts of searches that have ended to the host."""
    model, card = make(layers=2), Card()
    some = some_rows(model, of_all_kinds())
    way = Way(MaskedAttention, lambda: lambda run: partial(card.replay, run))
    loop = static_loop(model, ends=(2, 7), slots=SLOTS, budget=0, among=[way])
    first = anew(some)
    # Rare graphs are captured when they are first needed.
    by_threes(loop, first, lambda name, rows: getattr(loop, name)(rows))
    watched = run_watched(loop, some, card)
    assert said(some) == said(first)
    assert 0 < watched.most["step"] <= 24


# --- what fails for good --------------------------------------------------------------------------


class Flaky:
    """Graphs, run as they are, until they cannot be launched any more."""

    def __init__(self) -> None:
        self.works = True
        self.launched = 0

    def __call__(self, run: Run) -> Run:
        def replay() -> None:
            if not self.works:
                raise RuntimeError("CUDA driver error: invalid resource handle")
            self.launched += 1
            run()

        return replay


@pytest.mark.parametrize("make", [deep_opt, deep_t5])
def test_texts_go_on_without_graphs_that_cannot_be_launched_any_more(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, graphs = make(layers=2), Flaky()
    some = some_rows(model, of_all_kinds())
    expected = anew(some)
    to_their_ends(loop_of(model, "growing"), expected, lambda run: run())
    way = Way(MaskedAttention, lambda: graphs)
    loop = static_loop(model, ends=(2, 7), slots=SLOTS, budget=0, among=[way])
    assert isinstance(loop, StaticLoop)
    graphs.launched = 0
    calls = iter(range(1000))

    def attempt(run: Callable[[], object]) -> None:
        graphs.works = next(calls) < 4
        run()

    to_their_ends(loop, some, attempt)
    assert said(some) == said(expected)
    assert graphs.launched > 2
    assert "without its graph: RuntimeError: CUDA driver error" in caplog.text


def test_a_graph_for_which_there_is_no_memory_is_given_up_for_what_works() -> None:
    def full(run: Run) -> Run:
        raise out_of_memory()

    model = deep_opt(layers=2)
    among = [Way(MaskedAttention, lambda: full), EAGER]
    loop = static_loop(model, ends=(2, 7), slots=3, budget=0, among=among)
    assert loop is not None
    assert loop.way == "sdpa eagerly"


def test_a_context_that_breaks_while_slots_are_opened_ends_the_start(opt: Blip2) -> None:
    """All ways were given up, and the model was served: its first job found the device dead."""
    recorded = Way(MaskedAttention, lambda: lambda run: run)
    try:
        with Card() as card:
            card.die(after=150)
            with pytest.raises(torch.AcceleratorError):
                opt.open_slots([recorded, EAGER], slots=2, budget=0)
    finally:
        opt.generator._static = None


@pytest.mark.parametrize("kind", ["static", "growing"])
def test_a_broken_context_is_never_taken_for_a_rows_own_fault(kind: str) -> None:
    model = deep_opt(layers=2)
    some = some_rows(model, of_all_kinds())
    for place in (0, 7, 40, 75):
        for call in ("join", "step"):
            loop = loop_of(model, kind)
            if call == "step":
                loop.join(some)
            with Card() as card:
                card.die(after=place)
                with pytest.raises(torch.AcceleratorError) as broken:
                    getattr(loop, call)(some)
            assert is_device_fault(broken.value)
            some = anew(some)

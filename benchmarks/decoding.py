"""The decode loop against transformers' ``generate``: the same tokens, and how long they take.

    python -m benchmarks.decoding equality --rows 2000
    python -m benchmarks.decoding speed --rows 128

``equality`` runs rows with every penalty, joining and leaving at random, on the demo model, on its
T5 twin and on random weights, in fp32; each row is compared with ``generate`` alone, and samples
with those of other numbers of slots and other orders. It ends with 1 if one token differs.
``speed`` times rows of mixed lengths that all wait at the start; run it on a quiet machine.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.by_generate import hugging_face, quiet_about_penalties
from blipq_worker.blip2 import Blip2
from blipq_worker.blip2.decoding import DecodeLoop, Row, row_seed
from blipq_worker.catalog.models import demo_folder
from blipq_worker.demo.machine import describe_machine
from blipq_worker.inference.requests import GenerationParams

QUERIES = 32
VOCABULARY = 4000
PAD, END = 1, 3
T5_TWIN = Path(__file__).parent.parent / "tests" / "models" / "t5"


@dataclass(frozen=True)
class Subject:
    """A language model, its end tokens, and the prompts that it may get."""

    name: str
    model: Any
    ends: tuple[int, ...]
    pad: int
    mark: int
    words: int

    @property
    def encodes(self) -> bool:
        """Whether it is T5."""
        return bool(self.model.config.is_encoder_decoder)

    def row(self, dice: random.Random, params: GenerationParams) -> Row:
        """A row of a random image and a random prompt of 1 to 26 tokens."""
        source = torch.Generator().manual_seed(dice.getrandbits(40))
        embeddings = self.model.get_input_embeddings().weight
        queries = torch.randn(QUERIES, embeddings.shape[1], generator=source) * embeddings.std()
        words = [dice.randrange(4, self.words) for _ in range(dice.randrange(26))]
        ids = [*words, self.mark] if self.encodes else [self.mark, *words]
        return Row(queries.to(embeddings.dtype), ids, params, row_seed(dice.getrandbits(40)))


def trained(name: str, folder: Path) -> Subject:
    """The language model of a checkpoint."""
    generator = Blip2.load(str(folder), dtype="float32").generator
    model = generator.model.language_model
    (mark,) = generator.ids("")
    words = model.config.vocab_size
    return Subject(name, model, tuple(generator._eos), generator._pad, mark, words)


def untrained(family: str, width: int = 512, layers: int = 8) -> Subject:
    """Random weights; they seldom write an end."""
    torch.manual_seed(3)
    name = f"{family} {width} x {layers}, random"
    if family == "opt":
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=512,
            init_std=0.08,
        )
        return Subject(name, OPTForCausalLM(config).eval(), (END,), PAD, 2, VOCABULARY)
    t5 = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=64,
        d_ff=2 * width,
        num_heads=8,
        num_layers=layers,
        num_decoder_layers=layers,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(t5).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
        model.shared.weight.mul_(0.05)  # else it repeats its first token for ever
    return Subject(name, model, (END,), PAD, 1, VOCABULARY)


def fresh(rows: Sequence[Row]) -> list[Row]:
    """The same rows with nothing written."""
    return [Row(row.queries, row.ids, row.params, row.seed) for row in rows]


# --- equality -------------------------------------------------------------------------------------


def any_greedy(dice: random.Random) -> GenerationParams:
    """Limits and penalties of all sorts."""
    longest = dice.randint(1, 24)
    return GenerationParams(
        num_beams=1,
        max_new_tokens=longest,
        min_new_tokens=dice.randint(0, min(6, longest)),
        repetition_penalty=dice.choice([1.0, 1.0, 0.8, 1.3]),
        no_repeat_ngram_size=dice.choice([0, 0, 1, 2, 3]),
    )


def any_sampled(dice: random.Random) -> GenerationParams:
    """And of sampling."""
    return replace(
        any_greedy(dice),
        do_sample=True,
        temperature=dice.uniform(0.5, 2.0),
        top_p=dice.choice([0.8, 0.9, 1.0]),
        top_k=dice.choice([0, 5, 50]),
    )


def by_generate(subject: Subject, row: Row) -> list[int]:
    """A row alone."""
    embeds = _embeds(subject, [row])
    with torch.inference_mode(), quiet_about_penalties():
        (tokens,) = subject.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            eos_token_id=list(subject.ends),
            pad_token_id=subject.pad,
            **hugging_face(row.params),
        ).tolist()
    return tokens[1:] if subject.encodes else tokens


def in_flight(subject: Subject, rows: Sequence[Row], slots: int, dice: random.Random) -> list[Row]:
    """Rows that join and leave at random, and of which some are given up, as far as they came."""
    loop = DecodeLoop(subject.model, ends=subject.ends, slots=slots)
    rows = fresh(rows)
    waiting = list(rows)
    while waiting or loop.running:
        joining: list[Row] = []
        while waiting and loop.fits(waiting[0], joining) and dice.random() < 0.8:
            joining.append(waiting.pop(0))
        loop.join(joining)
        loop.step([row for row in loop.running if not row.ended and dice.random() < 0.9])
        gone = [row for row in loop.running if not row.ended and dice.random() < 0.002]
        loop.leave([row for row in loop.running if row.ended] + gone)
    return rows


def differ(found: Row, expected: list[int]) -> bool:
    """Whether a row's tokens are others; one that was given up has the beginning of them."""
    return found.tokens != (expected if found.ended else expected[: len(found.tokens)])


def compare(subject: Subject, number: int, seed: int) -> tuple[int, int, int]:
    """Greedy rows that differ from generate's, samples that differ by company, distinct texts."""
    dice = random.Random(seed)
    greedy = [subject.row(dice, any_greedy(dice)) for _ in range(number)]
    expected = [by_generate(subject, row) for row in greedy]
    wrong = 0
    for slots in (1, 3, 8, 32):
        found = in_flight(subject, greedy, slots, dice)
        wrong += sum(differ(*pair) for pair in zip(found, expected, strict=True))
    sampled = [subject.row(dice, any_sampled(dice)) for _ in range(number)]
    first = in_flight(subject, sampled, 16, dice)
    unlike = 0
    for slots in (5, 32):
        again = in_flight(subject, list(reversed(sampled)), slots, dice)
        for one, other in zip(first, reversed(again), strict=True):
            shared = min(len(one.tokens), len(other.tokens))
            unlike += one.tokens[:shared] != other.tokens[:shared]
    return wrong, unlike, len(set(map(tuple, expected)))


def equality(arguments: argparse.Namespace) -> int:
    """Prints how many rows differ; 1 if any does."""
    subjects = [
        lambda: trained("demo model (OPT)", demo_folder() / "opt"),
        lambda: trained("T5 twin", T5_TWIN),
        lambda: untrained("opt", 128, 4),
        lambda: untrained("t5", 128, 4),
    ]
    number = arguments.rows // len(subjects)
    table = Table(
        "model", "rows", "distinct", "greedy, 4 x", "sampled, 2 x", title="rows that differ"
    )
    failures = 0
    for make in subjects:
        subject = make()
        wrong, unlike, distinct = compare(subject, number, arguments.seed)
        failures += wrong + unlike
        table.add_row(subject.name, *map(str, (number, distinct, wrong, unlike)))
    Console().print(table)
    return min(failures, 1)


# --- speed ----------------------------------------------------------------------------------------


class _EachLimit(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at its own limit, which ``generate`` cannot take as a number."""

    def __init__(self, limits: Sequence[int], start: int) -> None:
        self._limits = torch.tensor(limits) + start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self._limits


def batches(subject: Subject, rows: Sequence[Row], size: int) -> list[float]:
    """``generate``, batch after batch; when each row was answered."""
    began, ends = time.perf_counter(), []
    for at in range(0, len(rows), size):
        batch = rows[at : at + size]
        limits = [row.params.max_new_tokens for row in batch]
        with torch.inference_mode():
            subject.model.generate(
                inputs_embeds=_embeds(subject, batch),
                attention_mask=_mask(subject, batch),
                eos_token_id=None,
                pad_token_id=subject.pad,
                max_new_tokens=max(limits),
                stopping_criteria=StoppingCriteriaList([_EachLimit(limits, int(subject.encodes))]),
                do_sample=False,
            )
        ends += [time.perf_counter() - began] * len(batch)
    return ends


def loop(subject: Subject, rows: Sequence[Row], slots: int, *, joining: int = 4) -> list[float]:
    """The decode loop; when each row was answered."""
    running = DecodeLoop(subject.model, ends=(), slots=slots)
    began, ends, waiting = time.perf_counter(), [], fresh(rows)
    while waiting or running.running:
        coming: list[Row] = []
        while waiting and len(coming) < joining and running.fits(waiting[0], coming):
            coming.append(waiting.pop(0))
        running.join(coming)
        running.step([row for row in running.running if not row.ended])
        done = [row for row in running.running if row.ended]
        running.leave(done)
        ends += [time.perf_counter() - began] * len(done)
    return ends


def speed(arguments: argparse.Namespace) -> int:
    """Prints rows per second, and when half and 95 % of the rows were answered."""
    ways: list[tuple[str, Callable[[Subject, Sequence[Row]], list[float]]]] = [
        ("generate, batches of 16", lambda subject, rows: batches(subject, rows, 16)),
        ("generate, batches of 32", lambda subject, rows: batches(subject, rows, 32)),
        ("in flight, 16 slots", lambda subject, rows: loop(subject, rows, 16)),
        ("in flight, 32 slots", lambda subject, rows: loop(subject, rows, 32)),
    ]
    for family in ("opt", "t5"):
        subject = untrained(family)
        dice = random.Random(arguments.seed)
        rows = [
            subject.row(dice, GenerationParams(num_beams=1, max_new_tokens=dice.randint(5, 50)))
            for _ in range(arguments.rows)
        ]
        table = Table("", "rows/s", "half done, s", "95 % done, s", title=subject.name)
        loop(subject, rows[:4], 4)  # warm
        for name, way in ways:
            ends = sorted(way(subject, rows))
            late = ends[int(0.95 * len(ends))]
            numbers = (len(rows) / ends[-1], statistics.median(ends), late)
            table.add_row(name, *(f"{number:.2f}" for number in numbers))
        Console().print(table)
    Console().print(f"{describe_machine()}; torch {torch.__version__}, fp32")
    return 0


def _embeds(subject: Subject, rows: Sequence[Row]) -> torch.Tensor:
    """Queries and prompts, padded as the family needs it."""
    embed = subject.model.get_input_embeddings()
    longest = max(len(row.ids) for row in rows)
    embedded = []
    for row in rows:
        gap = [subject.pad] * (longest - len(row.ids))
        ids = [*row.ids, *gap] if subject.encodes else [*gap, *row.ids]
        embedded.append(torch.cat([row.queries, embed(torch.tensor(ids)).detach()]))
    return torch.stack(embedded)


def _mask(subject: Subject, rows: Sequence[Row]) -> torch.Tensor:
    longest = max(len(row.ids) for row in rows)
    masks = []
    for row in rows:
        gap, ones = [0] * (longest - len(row.ids)), [1] * len(row.ids)
        masks.append([1] * QUERIES + (ones + gap if subject.encodes else gap + ones))
    return torch.tensor(masks)


def main() -> int:
    """Runs a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    commands = parser.add_subparsers(required=True)
    for run, rows in ((equality, 2000), (speed, 128)):
        command = commands.add_parser(run.__name__, help=(run.__doc__ or "").splitlines()[0])
        command.add_argument("--rows", type=int, default=rows)
        command.add_argument("--seed", type=int, default=1)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""``blipq models compare`` and ``record-golden``: whether another model may be served."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from blipq.cli.terminal.output import JsonOption, errors, out
from blipq.errors import BlipqError, InvalidRequest, QueueUnavailable
from blipq.ledger.cells.operator import operator_for
from blipq.settings import Settings
from blipq.submission import checked
from blipq_worker.cli.refusing import one_of, refused, require_torch
from blipq_worker.settings import Dtype, Quantization, WorkerSettings

if TYPE_CHECKING:
    from blipq_worker.compare.cases import Case, Skipped
    from blipq_worker.compare.difference import Comparison
    from blipq_worker.compare.run import Progress as Report

#: The exit code for a candidate that differs, as diff has it.
CHANGED = 1
#: Pairs in the JSON object.
_WORST = 20
#: Of each job some 0.6 MB of features are held until the candidate has answered.
_MOST = 2_000

CandidateArgument = Annotated[
    str, typer.Argument(help="As in BLIPQ_MODELS: a known model, or folders.")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="SERVED",
        help="Name in BLIPQ_MODELS, or a model; by default the one that BLIPQ_MODELS serves.",
    ),
]
JobsOption = Annotated[
    int, typer.Option(min=1, max=_MOST, help="Jobs that are replayed, the newest first.")
]
ManifestOption = Annotated[
    Path | None,
    typer.Option(
        "--manifest",
        metavar="FILE",
        help="Replay its first lines instead: JSON Lines, as for `blipq bulk submit`.",
    ),
]
PageOption = Annotated[
    Path, typer.Option("--report", metavar="FILE", help="Where the page is written.")
]


def compare(
    candidate: Annotated[
        str, typer.Argument(help="As in BLIPQ_MODELS: a known model, or folders.")
    ],
    against: AgainstOption = None,
    jobs: JobsOption = 500,
    manifest: ManifestOption = None,
    report: PageOption = Path("comparison.html"),
    as_json: JsonOption = False,
) -> None:
    """Replay recent jobs on another model, and report what it answers otherwise.

    Jobs of the served model that succeeded are run on both models in this process, one after the
    other, in fp32 on the same pictures. Texts must be equal, and numbers may differ by rounding
    only. A page shows the worst pairs side by side.

    Exits 0 where nothing changed, 1 where something did, 2 where nothing could be compared, and
    7 where Redis does not answer.

    Examples:
        blipq models compare ./opt-next --jobs 200
        blipq models compare opt-6.7b --manifest sample.jsonl --json
    """
    with refused(as_json):
        require_torch("comparing")
        options = _options()
        name, served = _served(options, against)
        comparison = _compared(candidate, name, served, jobs, manifest, report, options)
    if as_json:
        print(json.dumps({**comparison.as_dict(_WORST), "report": str(report)}))
    else:
        for line in _lines(comparison):
            out.print(line, markup=False)
        errors.print(f"the page: {report}", markup=False)
    if comparison.changed:
        raise typer.Exit(CHANGED)


def record_golden(
    model: CandidateArgument,
    output: Annotated[str, typer.Option(help="File to write to, or to add to.")] = "goldens.json",
    quantization: Annotated[str, typer.Option(help="none, int8, nf4 or auto.")] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    against: AgainstOption = None,
    jobs: JobsOption = 500,
    manifest: ManifestOption = None,
    report: PageOption = Path("comparison.html"),
    accept: Annotated[
        bool,
        typer.Option("--accept", help="Record it although it is another model, or not compared."),
    ] = False,
) -> None:
    """Record a model's answers to the canary, for later checks of it (BLIPQ_GOLDENS).

    Do it where the model is known to be well: quantized and damaged copies are measured by it.
    Where BLIPQ_MODELS serves another model, or --against names one, both are compared first (see
    `blipq models compare`), and what the file holds already is compared in any case. Exits 1, and
    records nothing, where something changed; 2 or 7 where no comparison is possible, as without a
    job to replay. --accept records it in both cases.

    Examples:
        blipq models record-golden opt-2.7b --output goldens.json
        blipq models record-golden ./opt-next --against opt-2.7b --accept
    """
    file = Path(output)
    with refused():
        one_of("--quantization", quantization, Quantization)
        one_of("--dtype", dtype, Dtype)
        require_torch("recording")
        from blipq_worker.serving.goldens import write_golden
        from blipq_worker.serving.record_golden import change, golden_now

        changes: list[str] = []
        try:
            changes += _changes(model, against, jobs, manifest, report)
        except BlipqError as error:
            if not accept:
                raise _not_compared(error) from error
            changes.append(f"not compared: {error}")
        golden = golden_now(model, quantization, dtype)
        if (found := change(file, model, golden)) is not None:
            changes.append(f"{file} has another one: {found}")
        for each in changes:
            errors.print(each, markup=False)
        if changes and not accept:
            errors.print("not recorded: --accept records it in spite of that")
            raise typer.Exit(CHANGED)
        write_golden(file, model, golden)
        print(json.dumps(golden.said.model_dump(mode="json"), indent=2))
    errors.print(f"recorded in {output}: BLIPQ_GOLDENS={output}", markup=False)


def _not_compared(error: BlipqError) -> BlipqError:
    """Why a model is not compared before it is recorded, and what records it all the same."""
    kind = QueueUnavailable if isinstance(error, QueueUnavailable) else InvalidRequest
    return kind(f"{error}; --accept records it without a comparison")


def _changes(
    model: str, against: str | None, jobs: int, manifest: Path | None, report: Path
) -> Iterator[str]:
    """What a comparison with the served model finds, on one line; nothing where there is none."""
    options = _options()
    is_alone = "models" not in options.model_fields_set or model in options.models.values()
    if against is None and is_alone:
        return
    name, served = _served(options, against)
    comparison = _compared(model, name, served, jobs, manifest, report, options)
    if comparison.changed:
        changed = sum(pair.changed for pair in comparison.pairs)
        yield f"{changed} of {len(comparison.pairs)} jobs changed against {served}: see {report}"


def _options() -> WorkerSettings:
    """Of both models: exact, with nothing known of any picture, and without a check of their own.

    A candidate that fails its check is shown by the comparison.
    """
    return checked(
        WorkerSettings,
        quantization="none",
        dtype="float32",
        compile=False,
        canary=False,
        feature_cache_bytes=0,
    )


def _served(options: WorkerSettings, against: str | None) -> tuple[str | None, str]:
    """The name whose jobs are replayed (None: those of all models), and what is served under it.

    Raises InvalidRequest.
    """
    if against is not None:
        return (against, options.models[against]) if against in options.models else (None, against)
    if len(options.models) > 1:
        names = ", ".join(options.models)
        raise InvalidRequest(f"--against: BLIPQ_MODELS serves several models: {names}")
    return next(iter(options.models.items()))


def _compared(
    candidate: str,
    name: str | None,
    served: str,
    jobs: int,
    manifest: Path | None,
    report: Path,
    options: WorkerSettings,
) -> "Comparison":
    """Compares, and writes the page. Raises BlipqError."""
    _require_writable(report)
    from transformers.utils import logging as transformers_logging

    from blipq_worker.compare.report import write_page
    from blipq_worker.compare.run import Guard, album

    transformers_logging.disable_progress_bar()
    settings = checked(Settings)
    cases, skipped = _cases(settings, name, jobs, manifest)
    with album(settings, options) as pictures, _bar(len(cases)) as progress:
        guard = Guard(pictures, options, progress)
        comparison = guard.compare(served, candidate, cases, skipped)
        with _reporting(report):
            write_page(comparison, pictures, report)
    return comparison


def _require_writable(report: Path) -> None:
    """Raises InvalidRequest where no page can be written: models take minutes to load."""
    if not report.name or report.is_dir():
        raise InvalidRequest(f"--report: {str(report)!r} is no name of a file")
    with _reporting(report), TemporaryFile(dir=report.parent):
        pass


@contextmanager
def _reporting(report: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"--report: cannot write {report}: {error.strerror}") from error


def _cases(
    settings: Settings, name: str | None, jobs: int, manifest: Path | None
) -> "tuple[list[Case], list[Skipped]]":
    from blipq_worker.compare.cases import of_manifest, recent

    if manifest is not None:
        return of_manifest(manifest, jobs), []
    with closing(operator_for(settings)) as ledger:
        return recent(ledger, name, jobs)


@contextmanager
def _bar(cases: int) -> "Iterator[Report]":
    """A bar on a terminal."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=2 * cases)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _lines(comparison: "Comparison") -> Iterator[str]:
    """What changed, for people."""
    from blipq_worker.compare.report import QUANTILES, number

    pairs = comparison.pairs
    changed = sum(pair.changed for pair in pairs)
    yield f"{changed} of {len(pairs)} jobs changed"
    if comparison.failures:
        yield f"  {comparison.failures} have no answer"
    if comparison.skipped:
        first = comparison.skipped[0]
        yield f"  {len(comparison.skipped)} were not compared: {first.name}: {first.why}"
    yield f"  {'texts':32} {comparison.rewritten} of {comparison.texts} differ"
    for each in comparison.farthest:
        angle = "" if each.cosine is None else f", cosine {each.cosine:.6f}"
        limit = number(each.limit)
        yield f"  {each.name:32} {number(each.distance)} at most (limit {limit}){angle}"
    for name, share in QUANTILES:
        served, candidate = comparison.latency(share)
        yield f"  {name:32} {served:.1f} ms, {candidate:.1f} ms by the candidate"

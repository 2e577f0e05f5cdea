"""``python -m benchmarks.gpu``: measures the whole product on one GPU and keeps the figures.

Three groups, each a process of its own with a limit in time: service, engine, checks. They import
side by side and run in turn. What fails or is cut short leaves the others' figures.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import record
from benchmarks.processes import end

ROOT = Path(__file__).parents[2]
#: Groups and the seconds that each may take, in a usual and in a long run.
GROUPS = {"service": (155, 270), "engine": (115, 140), "checks": (30, 50)}
#: The settings of the second worker of a long run: all that fills 128 slots.
FULL = {
    "BLIPQ_DECODE_SLOTS": "128",
    "BLIPQ_MAX_BATCH_SIZE": "64",
    "BLIPQ_CONCURRENCY": "256",
    "BLIPQ_DECODE_THREADS": "12",
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    tiny: bool
    long: bool
    folder: Path


#: In full, as it fits. What tells the large pictures apart are frequencies that a JPEG decoded at a
#: part of its size does not have: equal pixels would be computed once.
_ENGINE = {"BLIPQ_QUANTIZATION": "none", "BLIPQ_JPEG_DRAFT": "0"}


def main() -> int:
    """Runs the groups, then prints the table; 1 where a section failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small models, any device")
    parser.add_argument("--long", action="store_true", help="a second worker with 128 slots, too")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="where figures go")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}")
    if arguments.group:
        run_group(arguments.group, Options(arguments.tiny, arguments.long, arguments.folder))
        return 0
    with tempfile.TemporaryDirectory(prefix="blipq-gpu-", dir=_fast_folder()) as folder:
        options = Options(arguments.tiny, arguments.long, Path(folder))
        found = run_groups(arguments.groups or list(GROUPS), options)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    from benchmarks.gpu.table import text

    print(text([found]))
    return int(any("failed" in section for section in found["sections"].values()))


def _fast_folder() -> str | None:
    """Memory, where there is some: a checkpoint on it is as if read before."""
    shared = Path("/dev/shm")
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 16 * 2**30
    return str(shared) if roomy else None


def run_groups(groups: list[str], options: Options) -> dict[str, Any]:
    """Starts a process for each group, lets them run in turn, and gathers their figures."""
    started = time.time()
    running = [_start(group, options) for group in groups]
    for group, process in zip(groups, running, strict=True):
        limit = GROUPS[group][options.long] if not options.tiny else 300
        _go(options.folder, group).touch()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = end(process, patience_s=0)
        if code:
            _recorder(options.folder, group).write(
                f"{group}: the process", {"failed": f"it ended with {code} (limit {limit} s)"}
            )
    sections = record.merge(_lines(options.folder, group) for group in groups)
    return {**_about(), "seconds": round(time.time() - started), "sections": sections}


def _start(group: str, options: Options) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(options.folder)]
    command += ["--tiny"] * options.tiny + ["--long"] * options.long + ["--group", group]
    env = {**os.environ, "PYTHONPATH": _paths(), "HF_HUB_OFFLINE": "1"}
    if options.tiny:
        env["OMP_NUM_THREADS"] = "1"  # small models gain nothing from threads that wait
    return subprocess.Popen(command, env=env, cwd=ROOT)


def run_group(group: str, options: Options) -> None:
    """One group's sections, once its turn has come."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    sections = {"service": service, "engine": engine, "checks": checks}[group]
    prepared = sections(options)
    while not _go(options.folder, group).exists():
        time.sleep(0.05)
    prepared(_recorder(options.folder, group))


def service(options: Options) -> Any:
    """The whole service: as it comes but for 16 bits, and in a long run with 128 slots."""
    from benchmarks.gpu import service as whole

    def run(recorder: record.Record) -> None:
        model = options.folder / "checkpoint"
        writing = _write_checkpoint(model, options.tiny)
        cases: dict[str, Mapping[str, str]] = {"as it comes": {}}
        if options.long:
            cases["128 slots"] = FULL
        for name, more in cases.items():
            env = {"BLIPQ_MODELS": f"default={model}", "BLIPQ_CANARY": "0"}
            bench = _bench(whole, options, name, {**env, **_ENGINE, **more})
            with bench.running():
                if name == "as it comes":
                    recorder.run("checkpoint", partial(_written, writing, model))
                _serve(bench, recorder, name)
                if name == "as it comes":
                    seconds = 0.5 if options.tiny else 3.0
                    recorder.run("S3's stand-ins alone", partial(bench.stubs_alone, seconds))
                    jobs = 100 if options.tiny else 4_000
                    recorder.run("the client alone", partial(bench.client_alone, jobs))

    return run


def _write_checkpoint(folder: Path, tiny: bool) -> "subprocess.Popen[bytes]":
    """In a process of its own, which takes its share of the card with it."""
    command = [sys.executable, "-m", "benchmarks.gpu.weights", str(folder), *["--tiny"] * tiny]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": _paths()}, cwd=ROOT)


def _written(writing: "subprocess.Popen[bytes]", folder: Path) -> dict[str, float]:
    """Waits for the checkpoint."""
    if code := writing.wait(120):
        raise RuntimeError(f"the checkpoint was not written: {code}")
    return {"gib": sum(each.stat().st_size for each in folder.iterdir()) / 2**30}


def _bench(whole: Any, options: Options, name: str, env: Mapping[str, str]) -> Any:
    scratch = options.folder / name.replace(" ", "-")
    scratch.mkdir()
    if not options.tiny:
        return whole.Bench(scratch, env)
    seconds = {"greedy": 1.5, "default": 1.5, "12 MP": 3.0}
    work = {
        key: whole.Work(each.generation, each.size, seconds[key])
        for key, each in whole.WORK.items()
    }
    return whole.Bench(scratch, env, work=work, warm=8)


def _serve(bench: Any, recorder: record.Record, name: str) -> None:
    try:
        recorder.run(f"service, {name}: start", bench.start_worker)
        for kind in ("greedy", "default"):
            recorder.run(f"service, {name}: {kind}", partial(bench.backlog, kind))
        recorder.run(f"service, {name}: one job alone", bench.alone)
        if name == "as it comes":
            recorder.run(f"service, {name}: 12 MP", partial(bench.backlog, "12 MP"))
    finally:
        log = bench.log.read_text(errors="replace").splitlines()
        told = [line for line in log if "celery.app.trace" not in line]
        recorder.write(f"service, {name}: end of its log", {"lines": told[-8:]})
        bench.stop_worker()


def engine(options: Options) -> Any:
    """The model's side alone."""
    from benchmarks.gpu import engine as side

    card = side.Card(options.folder, options.tiny)
    greedy, beams = side.GREEDY, side.BEAMS
    seconds = 0.2 if options.tiny else 3.0

    def run(recorder: record.Record) -> None:
        peak: dict[str, float] = {}

        def peaks() -> dict[str, float]:
            peak.update(side.peaks(card))
            return peak

        def captions(name: str, model: Any, params: Any, slots: int, **more: Any) -> None:
            measured = partial(side.throughput, card, model, params, slots=slots, seconds=seconds)
            recorder.run(f"engine: {name}", partial(measured, **more))

        def steps(model: Any, counts: tuple[int, ...], how: Any = "none", more: str = "") -> None:
            recorder.run(
                f"steps: {model}{more}", partial(side.steps, card, model, counts, peak, how)
            )

        recorder.run("peaks", peaks)
        captions("greedy, 32 slots", "opt-2.7b", greedy, 32)
        captions("greedy, 128 slots", "opt-2.7b", greedy, 128)
        captions("greedy, 128 slots, beside two Python threads", "opt-2.7b", greedy, 128,
                 python_threads=2)  # fmt: skip
        captions("5 beams, 128 slots", "opt-2.7b", beams, 128)
        counts, batches = (1, 8, 32, 128), (1, 8, 32, 128)
        recorder.run("plain generate: greedy", partial(side.plain_generate, card, 1, batches))
        recorder.run("plain generate: 5 beams", partial(side.plain_generate, card, 5, batches[:3]))
        steps("opt-2.7b", counts)
        recorder.run("a step of 32", partial(side.step_profile, card))
        recorder.run("looks", partial(side.looks, card, (1, 4, 16, 64, 128), peak))
        recorder.run("memory: 16 bits", partial(side.memory, card, "none"))
        captions("flan-t5-xl, greedy, 128 slots", "flan-t5-xl", greedy, 128)
        steps("flan-t5-xl", counts)
        for how in ("nf4", "int8") if card.device == "cuda" else ():
            steps("opt-2.7b", (1, 32, 128), how, f", {how}")
            recorder.run(f"memory: {how}", partial(side.memory, card, how))
        steps("opt-2.7b", (512,), more=", 512")

    return run


def checks(options: Options) -> Any:
    """Whether answers are right."""
    from benchmarks.gpu import checks as right
    from benchmarks.gpu.engine import Card

    card = Card(options.folder / "checks", options.tiny)

    def run(recorder: record.Record) -> None:
        recorder.run("answers: fp32 against a CPU", partial(right.tokens, card))
        recorder.run("answers: default precision", partial(right.precisions, card))
        for how in ("int8", "nf4"):
            recorder.run(f"answers: {how}", partial(right.quantized, card, how))
        recorder.run("matching", partial(right.matching, card))
        recorder.run("a dead context", partial(right.dead_context, card))

    return run


def _about() -> dict[str, Any]:
    import platform

    import torch
    import transformers

    on_card = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if on_card else "none: a dry run on a CPU",
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _commit() -> str:
    """The checkout's, or that of the one that the kit was made from."""
    made_from = ROOT / "COMMIT"
    if made_from.exists():
        return made_from.read_text().strip()
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    ran = subprocess.run(command, capture_output=True, text=True)
    return ran.stdout.strip()


def _paths() -> str:
    here = [ROOT, ROOT / "producer", ROOT / "worker"]
    return os.pathsep.join([*map(str, here), *filter(None, [os.environ.get("PYTHONPATH")])])


def _go(folder: Path, group: str) -> Path:
    return folder / f"{group}.go"


def _lines(folder: Path, group: str) -> Path:
    return folder / f"{group}.jsonl"


def _recorder(folder: Path, group: str) -> record.Record:
    return record.Record(_lines(folder, group))


if __name__ == "__main__":
    sys.exit(main())

"""A worker's main process as it ships, around an engine without a model and fronts without Celery.

As a script it is any of the three: ``main FRONTS``, and what the main process starts. Fronts take
messages from Redis, note and claim as real ones do, and do what the caption's prompt says: "hold"
keeps the claim, "decode" keeps decoding, "segfault" and "hang" end the process while they decode,
"unclaimed" never claims, "shut down" ends the process as Celery's remote control does, others
succeed. On SIGTERM a front gives back what it holds and ends. The engine refuses its model at
SIGUSR1, or at once with ``STAND_IN_REFUSES``.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blipq.contract import Kind
from blipq.ledger.connection import connect
from blipq.ledger.worker import Claim, WorkerLedger, new_nonce
from blipq.settings import Settings
from blipq_worker.fronts.holdings import Holdings
from blipq_worker.fronts.status import FrontStatus, write_status
from blipq_worker.inference import EngineClient, EngineGone, EngineServer
from blipq_worker.process.metrics import WorkerMetrics, count_in
from blipq_worker.settings import WorkerSettings
from blipq_worker.supervision.worker import SplitWorker

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from worker.inference.stand_in import StandIn

QUEUE = "blipq.default.normal"
COMMAND = [sys.executable, __file__]
RESULT = json.dumps({"kind": "caption", "captions": [{"text": "did it"}]})


def run_main(fronts: int) -> int:
    return SplitWorker(Settings(), WorkerSettings(), fronts, COMMAND).run()


def run_engine(folder: Path) -> int:
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    if "STAND_IN_REFUSES" in os.environ:
        print("the model cannot be loaded", file=sys.stderr)
        return 78
    (folder / "engine.environment").write_text(json.dumps(dict(os.environ)))
    server = EngineServer(folder / "engine.sock", StandIn())
    while signal.SIGUSR1 not in told:
        server.poll(0.05)
        server.progress()
        if told and server.fronts == 0:
            server.close()
            return 0
    server.close("the model answers nonsense")
    return 78


class Front:
    """Takes one message at a time, and goes on while it holds others."""

    def __init__(self, folder: Path, number: int, worker: str) -> None:
        count_in(folder / "metrics", f"front-{number}")
        self._number, self._worker = number, worker
        self._status_path = folder / f"front-{number}.json"
        self._metrics = WorkerMetrics()
        self._holdings = Holdings(folder / f"front-{number}.held", places=8)
        self._ledger = WorkerLedger(connect(Settings()), Settings())
        self._claims: list[Claim] = []
        self._kept = ExitStack()
        self._leaving = False
        self._gone = threading.Event()
        self._client = EngineClient(
            folder / "engine.sock", name=f"front{number}", on_lost=lambda _: self._gone.set()
        )

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._leave)
        while not (self._connected() or self._leaving):
            self._tell()
        while not self._leaving:
            if self._gone.is_set():
                self._give_back()
                return 75
            self._tell()
            message = self._ledger.redis.rpop(QUEUE)
            if message is not None:
                self._take(json.loads(message)["headers"])
            time.sleep(0.02)
        self._give_back()
        self._client.close()
        return 0

    def _connected(self) -> bool:
        try:
            return self._client.connected and bool(self._client.models())
        except EngineGone:
            return False

    def _leave(self, *_: Any) -> None:
        self._leaving = True

    def _tell(self) -> None:
        write_status(
            self._status_path,
            FrontStatus(
                pid=os.getpid(),
                number=self._number,
                beat=time.monotonic(),
                threads=8,
                active=len(self._claims),
                taking=self._client.connected and not self._leaving,
                draining=self._leaving,
                problems={} if self._client.connected else {"engine": "it is away"},
                live={},
            ),
        )

    def _take(self, headers: Any) -> None:
        id, kind = headers["id"], Kind(headers["task"].removeprefix("blipq."))
        self._holdings.take(id, kind, QUEUE)
        prompt = json.loads(self._ledger.redis.hget(f"blipq:job:{id}", "request"))["prompt"]
        logging.info("takes %r", prompt)
        if prompt == "unclaimed":
            return
        nonce = new_nonce()
        self._holdings.asking(id, nonce)
        claim = self._ledger.claim(id, self._worker, lease_s=60, nonce=nonce)
        if not isinstance(claim, Claim) or prompt == "unheard":
            return
        self._holdings.claimed(claim)
        if claim.solo:
            self._ledger.begin(claim)
        self._obey(prompt, claim)

    def _obey(self, prompt: str, claim: Claim) -> None:
        match prompt:
            case "hold":
                self._claims.append(claim)
            case "decode":
                self._claims.append(claim)
                self._kept.enter_context(self._holdings.decoding(claim.id))
            case "segfault":
                with self._holdings.decoding(claim.id):
                    os.kill(os.getpid(), signal.SIGSEGV)
            case "shut down":
                self._ledger.hand_back(claim)
                os._exit(79)
            case "hang":
                with self._holdings.decoding(claim.id):
                    os._exit(70)
            case _:
                self._ledger.succeed(claim, RESULT, "{}")
                self._metrics.done(claim.kind, "succeeded", {}, model=claim.model)
                self._holdings.unclaimed(claim.id)
                self._holdings.release(claim.id)

    def _give_back(self) -> None:
        for claim in self._claims:
            self._ledger.hand_back(claim)


def main() -> int:
    logging.basicConfig(level="INFO", format="%(asctime)s %(process)d %(name)s: %(message)s")
    match sys.argv[1:]:
        case ["main", fronts]:
            return run_main(int(fronts))
        case ["engine", "--run", folder]:
            return run_engine(Path(folder))
        case ["front", "--run", folder, "--number", number, "--of", _, "--worker", worker]:
            return Front(Path(folder), int(number), worker).run()
    raise SystemExit(f"what is {sys.argv[1:]}?")


if __name__ == "__main__":
    sys.exit(main())

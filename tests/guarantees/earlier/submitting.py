"""A producer of whichever version PYTHONPATH names: ``submitting.py FOLDER STOP_FILE``.

It submits until the file is there, then waits for all jobs and prints what became of them.
"""

import json
import sys
import time
from pathlib import Path

import blipq

PAUSE_S = 0.05
#: Both versions submit one job under this key, with the same request.
KEY = "of both"


def main(folder: Path, stop: Path) -> None:
    assert Path(blipq.__file__).is_relative_to(folder), blipq.__file__
    with blipq.Client() as client:
        image = "s3://photos/cat.jpg"
        jobs = [client.caption(image, "a photo of", idempotency_key=KEY, metadata={"a": "1"})]
        print(json.dumps(jobs[0].id), flush=True)
        while not stop.exists():
            jobs.append(client.caption(image, f"photo {len(jobs)} of"))
            time.sleep(PAUSE_S)
        infos = [job.wait(120) for job in jobs]
    outcomes = {
        info.id: [
            info.status,
            info.result.text if info.result else str(info.error),
            info.attempts,
            info.receipt.worker if info.receipt else None,
        ]
        for info in infos
    }
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""The guarantee tests' stand-in for a model must fit the worker: told here, where it is quick."""

from pathlib import Path

from guarantees.rig import Rig


def test_a_job_succeeds_on_the_rig(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    try:
        rig.start_worker()
        job = rig.submit("hello")
        match = rig.client.match(rig.image, "a match")
        assert (job.result(30).text, len(match.result(30).scores)) == ("did hello", 1)
    finally:
        rig.close()

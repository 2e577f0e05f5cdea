"""A loop over batches in one process, without any queue: the ceiling of transformers' generate."""

from common import Model, job, tell, timed


def _in_batches(model: Model, work: list, size: int) -> list:
    parts = [work[start : start + size] for start in range(0, len(work), size)]
    return [text for part in parts for text in model.answer(part)]


if __name__ == "__main__":
    model = Model()
    tell(
        {
            f"batches of {size}": timed(lambda work, size=size: _in_batches(model, work, size))
            for size in job()["batches"]
        }
    )

"""The requests of a benchmark: the same of the bare engine and of the service."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blipq.contract import CaptionRequest, Generation, ImageRef, Request, VQARequest

#: Ten short questions, as a service has about a photo.
QUESTIONS = (
    "what is in the picture?",
    "what color is it?",
    "how many are there?",
    "where is it?",
    "is it day or night?",
    "what is on the left?",
    "what is on the right?",
    "what is behind it?",
    "is there a person?",
    "what is it made of?",
)
PROMPT = "a photo of"
#: From one image's length to the next one's: any few images in a row have short and long texts.
_STRIDE = 17


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    shortest, longest: new tokens, spread evenly over any few images and generated exactly; None
    leaves the model's defaults (5 beams). questions: about each image; 0 is a caption.
    """

    name: str
    about: str
    shortest: int | None = None
    longest: int | None = None
    questions: int = 0

    def images(self, jobs: int) -> int:
        """How many of so many jobs are run: half of them where each has ten questions."""
        return -(-jobs // 2) if self.questions else jobs

    def generations(self, count: int, seed: int = 1) -> list[Generation | None]:
        """The generation parameters of ``count`` images; the same for the same seed."""
        if self.shortest is None or self.longest is None:
            return [None] * count
        span = self.longest - self.shortest + 1
        lengths = [self.shortest + (seed + _STRIDE * n) % span for n in range(count)]
        return [Generation(num_beams=1, min_new_tokens=n, max_new_tokens=n) for n in lengths]

    def requests(self, images: Sequence[ImageRef], seed: int = 1) -> Iterator[Request]:
        """A request per image."""
        for image, generation in zip(images, self.generations(len(images), seed), strict=True):
            if self.questions:
                questions = QUESTIONS[: self.questions]
                yield VQARequest(image=image, questions=questions, generation=generation)
            else:
                yield CaptionRequest(image=image, prompt=PROMPT, generation=generation)


DEFAULT = Workload("default", "a default job: caption, 5 beams")
GREEDY = Workload("greedy-20", "caption, greedy, 20 tokens", 20, 20)
MIXED = Workload("greedy-5-50", "caption, greedy, 5 to 50 tokens", 5, 50)
TEN = Workload("ten-questions", "ten questions about each image, greedy, 20 tokens", 20, 20, 10)
WORKLOADS = (DEFAULT, GREEDY, MIXED, TEN)
#: Arrivals, as shares of what a full backlog reaches.
LOADS = {"30 %": 0.3, "60 %": 0.6, "90 %": 0.9}

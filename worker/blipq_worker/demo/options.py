"""The options of ``blipq demo``; ``blipq_worker.cli.demo`` describes them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The command's options."""

    images: int
    seed: int
    quantization: str
    report: Path
    model: str
    as_json: bool

    @property
    def command(self) -> str:
        """What repeats this run."""
        words = ["blipq demo", f"--images {self.images}", f"--seed {self.seed}"]
        words += [f"--quantization {self.quantization}"] if self.quantization != "auto" else []
        words += [f"--model {self.model}"] if self.model != "demo" else []
        return " ".join(words)

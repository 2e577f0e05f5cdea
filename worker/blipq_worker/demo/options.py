"""The options of ``blipq demo``; the command describes them."""

import argparse
import secrets
from collections.abc import Sequence
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


def parse(arguments: Sequence[str] | None) -> Options:
    """The options; without a seed, a random one."""
    parser = argparse.ArgumentParser("blipq demo", add_help=False)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", dest="as_json", action="store_true")
    given = vars(parser.parse_args(arguments))
    seed = secrets.randbelow(1_000_000) if given["seed"] is None else given["seed"]
    return Options(**{**given, "seed": seed})

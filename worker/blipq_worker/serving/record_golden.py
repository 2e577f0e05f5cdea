"""Records what a model says to the canary: what ``blipq models
record-golden`` runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from blipq.errors import BlipqError
from blipq.submission import checked
from blipq_worker.serving.canary import golden_of
from blipq_worker.serving.goldens import write_golden
from blipq_worker.serving.loader import load_models
from blipq_worker.settings import Dtype, Quantization, WorkerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Records a golden; the exit code."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="blipq models record-golden")
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quantization", choices=get_args(Quantization), default="none")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    arguments = parser.parse_args(argv)
    try:
        options = checked(
            WorkerSettings,
            models={"default": arguments.model},
            quantization=arguments.quantization,
            dtype=arguments.dtype,
            canary=False,
        )
        golden = golden_of(load_models(options)["default"])
        write_golden(arguments.output, arguments.model, golden)
    except BlipqError as error:
        print(f"blipq models: {error}", file=sys.stderr)
        return 2
    print(golden.said.model_dump_json(indent=2))
    print(f"recorded in {arguments.output}: BLIPQ_GOLDENS={arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

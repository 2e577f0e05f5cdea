"""The commands of ``blipq bulk`` that datasets bring."""

from blipq_datasets.cli.estimating import estimate
from blipq_datasets.cli.reporting import report
from blipq_datasets.cli.submitting import submit

__all__ = ["estimate", "report", "submit"]

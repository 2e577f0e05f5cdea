"""``blipq doctor``: looks at everything a job needs, from where this process stands.

Each finding is ok, or has advice. Light like the rest of the producer's side: checks that need the
worker's package are a command of the worker's, in a process of its own.
"""

from blipq.ops.doctor.examination import examine
from blipq.ops.doctor.findings import Finding

__all__ = ["Finding", "examine"]

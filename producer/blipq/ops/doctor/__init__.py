"""``blipq doctor``: looks at everything a job needs, from where this process stands.

Each finding is ok, or says what to do. Light like the rest of the producer's side: what only a
worker can know, a command of the worker's says in a process of its own.
"""

from blipq.ops.doctor.examination import examine
from blipq.ops.doctor.findings import Finding

__all__ = ["Finding", "examine"]

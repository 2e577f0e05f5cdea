"""blipq's worker: keeps BLIP-2 resident, pulls jobs in batches and ends them in the ledger."""

from blipq_worker import startup as startup  # the start is counted from here

"""Outcomes by signed webhook: what is sent, what the answer means, and the process that sends it.

    delivery → response → outbox → sender

The outbox entry is written by the script that changes the job's status (``common.lua`` of the
ledger), so whatever dies, no outcome is without its webhook.
"""

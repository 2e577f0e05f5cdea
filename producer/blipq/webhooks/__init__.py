"""Outcomes by signed webhook: which URLs may be met, what is sent, and the process that sends it.

    guard → delivery → outbox → sender

The outbox entry is written by the script that changes the job's status (``lua/common.lua``), so
whatever dies, no outcome is without its webhook.
"""

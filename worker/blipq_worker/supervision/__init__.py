"""A worker's main process, where the worker has fronts.

It runs one *engine* (the models and their batcher) and its *fronts* (Celery, ledger, fetch,
decode), starts again what dies, and gives back what a dead front held. Towards the outside all of
them are one worker: one entry in the registry, one reconciler, one health port. Read ``worker``
first.
"""

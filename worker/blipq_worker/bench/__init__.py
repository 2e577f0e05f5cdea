"""Benchmarks: the bare engine against the whole service, on a model and a machine of one's own.

    workloads, pictures → bare (a process with the engine alone), stack (queue, S3 and worker) → run

Every number is measured in one run on one machine, so what counts are the ratios. The repository's
``benchmarks`` folder adds peers, overhead and scale with the same parts.
"""

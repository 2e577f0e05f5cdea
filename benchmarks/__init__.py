"""Benchmarks of the repository: ``make bench``. See ``docs/performance.md``.

``blipq_worker.bench`` has the harness that users have too; here are the mid-size model, the peers,
and what is measured beside throughput. Each section writes ``benchmarks/results/<section>.json``.
"""

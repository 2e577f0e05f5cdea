"""Uploads become jobs: rules name the objects, and the job that each becomes.

``rules`` are read from a file. A source (``sqs`` or ``polling``) says which objects are new,
``objects`` asks S3 what they are, ``watcher`` makes one job of each object that a rule takes, and
only then acknowledges it to the source. ``backfill`` does the same to what is there already.
"""

"""Uploads become jobs: rules name the objects, and the job that each becomes.

``rules`` are read from a file. A source (``queue`` or ``listing``) names the objects that are new,
``objects`` reads their metadata from S3, ``watcher`` makes one job of each object that matches a
rule, and only then acknowledges it to the source. ``start`` chooses the sources of a run.
"""

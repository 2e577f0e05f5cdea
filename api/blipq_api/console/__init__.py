"""The console: pages for people, on what the door's operations answer.

Each page lies directly under ``/console/`` and links relatively, so that it works under any
sub-path, whether a proxy keeps that or takes it away. Ids are in the query: they may hold slashes.
"""

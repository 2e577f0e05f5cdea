"""The job records in Redis: they decide what happens to a job, and Celery carries messages.

Every change of a job is one Lua script (``scripts/``) on Redis' own clock, so no crash can leave
half of it. A job is a hash that outlives its message; the zsets beside it hold what is due. Every
key has a time to live.

``producer``, ``async_producer``, ``worker`` and ``operator`` are the clients, on ``scripts.runner``
and ``connection``. ``keys`` has all names, ``codec`` the scripts' arguments and replies.
"""

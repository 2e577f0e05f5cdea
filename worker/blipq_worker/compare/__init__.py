"""The guard of an upgrade: what a candidate model answers otherwise than the one that is served.

Both replay the same jobs in one process, one after the other, in the same precision and one job at
a time, so that a model that is unchanged comes to the same numbers. Read in this order: ``cases``
(what is replayed), ``replay`` (what a model makes of it), ``difference`` (what counts as a change),
``run`` (the whole), ``report`` (the page).
"""

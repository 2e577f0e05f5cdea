"""Many requests from a manifest, a bounded number of them in flight, none lost.

``manifest`` reads the requests one by one, ``journal`` keeps on disk which are open and what became
of the others, ``driver`` submits and collects, ``results`` writes them out. The driver can be
killed anywhere: it goes on where the journal ends.
"""

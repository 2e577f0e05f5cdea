"""Datasets as bulks: tables, tars and folders of pictures in, the same rows with answers out.

``sources`` reads rows, ``recipe`` makes a request of each, ``uploads`` holds the pictures that lie
nowhere else while jobs are about them, ``journal`` keeps what became of each row, and ``output``
writes the answered shards. Submitting, collecting and going on after a kill are ``blipq.bulk``'s.
"""

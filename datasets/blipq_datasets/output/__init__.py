"""Answered shards: the original columns and the answers, in files that are whole or not there."""

"""Celery's messages: checked before Celery parses them, refused where malformed, revoked."""

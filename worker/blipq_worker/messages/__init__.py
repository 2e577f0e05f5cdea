"""Celery's messages: checked, consumed, revoked, and found again."""

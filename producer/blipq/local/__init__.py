"""A local stack: Redis, S3 and workers as child processes."""

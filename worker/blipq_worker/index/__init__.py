"""What the worker's jobs write into search indexes."""

"""Stand-ins for parts of the real stack: a model, a failing S3, a Redis that loses answers."""

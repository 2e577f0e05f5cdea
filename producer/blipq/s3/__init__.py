"""Objects in S3-compatible storage, and what its refusals mean."""

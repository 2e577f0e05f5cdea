"""The job records in Redis, and the scripts that change them."""

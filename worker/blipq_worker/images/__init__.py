"""Images: fetched, checked and decoded under limits."""

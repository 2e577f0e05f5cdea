"""Images: fetched under limits, and kept in memory within a budget."""

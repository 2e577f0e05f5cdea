"""Long runs under faults, with an audit at the end: programs, of which tests make short runs."""

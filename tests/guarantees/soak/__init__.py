"""Long runs under faults, with an audit at the end, and short ones of them as tests."""

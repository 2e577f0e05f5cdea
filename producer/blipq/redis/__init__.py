"""Redis' address: one server, or those behind sentinels."""

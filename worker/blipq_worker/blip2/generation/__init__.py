"""From features and prompts to texts."""

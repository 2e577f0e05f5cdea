"""The version before this one beside it."""

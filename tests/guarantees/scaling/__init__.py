"""A fleet that grows and shrinks by itself."""

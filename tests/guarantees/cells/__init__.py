"""Cells: servers for tests, and what must hold while one dies, drains or joins."""

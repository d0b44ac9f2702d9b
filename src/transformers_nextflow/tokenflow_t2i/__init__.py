"""TokenFlow-t2i, the nearest relative with public weights."""

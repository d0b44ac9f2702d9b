"""TokenFlow-t2i, the nearest relative of NextFlow with public weights."""

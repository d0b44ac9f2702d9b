"""Sequences of text and images: positions, slots, attention between them, and the loss."""

"""Sequences of text and images: where an image lies, which positions see each other, and the loss."""

"""Checkpoints of other models to ours, and back."""

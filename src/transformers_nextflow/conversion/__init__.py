"""Converters of checkpoints from other models to ours, and back."""

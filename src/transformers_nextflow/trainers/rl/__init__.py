"""RL on the first scales, on TRL."""

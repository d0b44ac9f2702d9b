"""What every training has: checked settings, checkpoints, exact resuming, finite numbers."""

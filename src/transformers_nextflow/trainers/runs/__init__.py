"""What all trainers share: checked settings, checkpoints, exact resuming, finite numbers."""

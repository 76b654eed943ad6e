"""What keeps a run from losing work: complete checkpoints, resuming, signals, rewards that fail."""

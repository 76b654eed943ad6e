"""Runs that are disturbed, and lose nothing: whole checkpoints, resuming, signals, rewards that fail."""

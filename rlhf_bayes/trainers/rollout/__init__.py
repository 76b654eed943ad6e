"""What trainers that draw completions share: prior, reward functions, checks, configuration, checkpoints."""

"""Parts shared by trainers that draw completions: prior, reward functions, checks, configuration, checkpoints."""

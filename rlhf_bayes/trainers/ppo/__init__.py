"""PPO with an explicit KL penalty to the prior."""

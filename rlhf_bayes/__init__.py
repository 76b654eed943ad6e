"""RLHF as Bayesian inference: know which distribution you train towards, and how far you are from it."""

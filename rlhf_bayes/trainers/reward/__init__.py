"""Reward models from pairwise preferences."""

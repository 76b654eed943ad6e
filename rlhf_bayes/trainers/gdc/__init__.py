"""Generative distributional control: any f-divergence to any posterior."""

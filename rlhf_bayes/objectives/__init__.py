"""Layer 3: what a gradient step minimises. No trainer, no trl and no accelerate in here."""

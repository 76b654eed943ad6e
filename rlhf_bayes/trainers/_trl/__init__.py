"""All contact with TRL's private names: one module for each TRL trainer that ours extend."""

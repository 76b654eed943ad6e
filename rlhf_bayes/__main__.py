"""`python -m rlhf_bayes`: the same as `rlhf-bayes`."""

from .commands import main

main()

"""`python -m rlhf_bayes`: the same as `rlhf-bayes`."""

from rlhf_bayes.commands import main

main()

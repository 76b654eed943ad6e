"""The claims of the paper, one script each: run by `rlhf-bayes claims`, or as they are."""

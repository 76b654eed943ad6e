"""
An enumerable toy language model, whose posterior is known exactly, and the contract that every posterior must keep.

    toy = EnumerableLM()                                            # 4,681 completions of three prompts
    posterior = tilt(LanguageModel(toy.model, toy.tokenizer, max_completion_length=4), my_reward, beta=0.5)
    check_posterior(posterior, toy.prompts, enumerable=toy)         # does my posterior keep the contract?
    toy.reverse_kl(trained_model)                                   # how far is a policy from toy_reward's, in nats?

The exact values are computed by another route than in the rest of the package: by enumerating every completion, with a
full-vocabulary log-softmax of `model(...).logits`, one prompt at a time without padding.
"""

from rlhf_bayes.testing.contract import check_posterior
from rlhf_bayes.testing.enumerable import EnumerableLM, toy_reward

__all__ = ["EnumerableLM", "check_posterior", "toy_reward"]

r"""Draws from a posterior without training, and measures how far policies are from it, like `rlhf-bayes sample`.

Korbak, Perez & Buckley 2022 (arXiv 2205.11275, section 4) point out that a posterior can be sampled by decoding, to
see whether it is wanted before anything is trained. The recipe answers three questions, in this order:

1. Which β? One set of completions of the prior is reweighted to the posterior of each β. A table shows its reward, its
   KL to the prior, and log Z, the bound on what training can reach.
2. Is that posterior what is wanted? Several samplers draw completions from it; their means must agree within their
   errors.
3. Do policies reach it? Their distance is estimated in nats, in both directions.

Without arguments, in about a minute on two CPU cores, the bundled model and its sentiment reward:

    python recipes/sample_posterior.py

Any causal LM, prompts and reward, and policies trained with either:

    python recipes/sample_posterior.py --model_name_or_path Qwen/Qwen2.5-0.5B --beta 0.1 \
        --dataset_name stanfordnlp/imdb --prompt_column text --max_prompts 16 \
        --reward_func rlhf_bayes.toy.rewards:vader_reward --reward_clip_range -1 1 --policy runs/ppo_klrl

`--condition module:predicate` conditions on a predicate, with a reward or without one.
"""

from rlhf_bayes.commands.sample import main

if __name__ == "__main__":
    main()

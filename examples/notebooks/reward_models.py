# %% [markdown]
"""
# Reward models and over-optimisation

A reward model is fitted to what people said of a few completions, and is wrong elsewhere. The further a policy goes
from the prior, the more it finds the places where it is wrong. Here the true reward is known, the votes of three
simulated annotators are bundled, and nothing is trained but the reward model: draws of the prior tell what the
posterior of each β would reach. Under a minute on one core.
"""

# %%
import tempfile

import torch

from rlhf_bayes import LanguageModel, RewardConfig, RewardTrainer, toy
from rlhf_bayes.numerics import pool
from rlhf_bayes.toy.rewards import sentiment_reward

pairs = toy.preferences("train").shuffle(seed=0).select(range(60))
print(pairs[0]["prompt"], "|", pairs[0]["chosen"], "|", pairs[0]["rejected"], "| votes", pairs[0]["votes"])

# %% [markdown]
# ## Four reward models on sixty comparisons
#
# Four heads on one trunk, each on a resampled set of pairs. What they agree on, the data said; where they differ,
# they guess.

# %%
config = RewardConfig(
    output_dir=tempfile.mkdtemp(),
    num_members=4,
    learning_rate=1e-3,
    num_train_epochs=6,
    per_device_train_batch_size=20,
    max_length=64,
    use_cpu=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
    seed=0,
)
trainer = RewardTrainer(
    model=toy.model_path(), args=config, train_dataset=pairs, eval_dataset=toy.preferences("test").select(range(100))
)
trainer.train()
metrics = trainer.evaluate()
print(f"held-out accuracy {metrics['eval_accuracy']:.2f}, log loss {metrics['eval_log_loss']:.3f} nats")

# %% [markdown]
# ## One set of draws, all posteriors
#
# The prior's completions are scored by each member and by the true reward; both get mean 0 and standard deviation 1.

# %%
prior = LanguageModel(toy.model_path(), max_completion_length=32)
prompts = toy.prompts()[:6]
draws = prior.sample(prompts, n=128, generator=torch.Generator().manual_seed(0))
members = trainer.reward().member_rewards(draws.prompts, draws.completions).double().view(4, len(prompts), -1)
gold = torch.tensor(sentiment_reward(draws.completions), dtype=torch.float64).view(len(prompts), -1)


def standardised(rewards):
    """Mean 0 for each prompt, and standard deviation 1 over all draws."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / centred.std(dim=(-2, -1), keepdim=True)


members, gold = standardised(members), standardised(gold)

# %% [markdown]
# The posterior of β weighs a draw by exp(r/β). Its proxy reward keeps rising as β falls. The true reward does not
# keep up, and the distance between the two is over-optimisation. Pessimistic pooling takes the side of the members
# that like a text least: here it promises less, and what it reaches is about the same.

# %%
proxies = {
    "one member": lambda beta: members[0],
    "mean": lambda beta: pool(members, "mean"),
    "pessimistic": lambda beta: pool(members, "pessimistic", beta=beta),
}
print(f"{'':12}  {'β':>5}  {'proxy':>6}  {'gold':>6}")
for name, proxy_of in proxies.items():
    for beta in (2.0, 1.0, 0.5, 0.25):
        proxy = proxy_of(beta)
        weights = (proxy / beta).softmax(-1)
        reached = [(weights * rewards).sum(-1).mean().item() for rewards in (proxy, gold)]
        print(f"{name:12}  {beta:5}  {reached[0]:6.2f}  {reached[1]:6.2f}")

# %% [markdown]
# The same with trained policies, three seeds and errors: `make rlhf`. That pooling helps is no law: on fewer or other
# pairs the members may agree on what is wrong.

# %%
one = (members[0] / 0.25).softmax(-1)
assert (one * members[0]).sum(-1).mean() > (one * gold).sum(-1).mean()  # the proxy promises more than is true

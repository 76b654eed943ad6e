# %% [markdown]
"""
# The posterior by hand

A language model with so few completions that all of them can be written down: then the posterior is a
multiplication, and everything that samplers and trainers estimate can be checked. It runs in seconds on one core.
"""

# %%
import torch

from rlhf_bayes import LanguageModel
from rlhf_bayes.numerics import importance_ess, what_if
from rlhf_bayes.samplers import ImportanceSampler
from rlhf_bayes.testing import EnumerableLM, toy_reward

toy = EnumerableLM(vocab_size=5, max_completion_length=3)
print(f"{len(toy.completions)} completions of each of the prompts {toy.prompts}")

# %% [markdown]
# ## Prior times evidence
#
# π0 is the model, the evidence is exp(r/β), and Z is what makes the product sum to 1.

# %%
beta = 0.5
log_prior = toy.log_probs()  # (P, N), nats
log_evidence = toy.rewards / beta
log_z = (log_prior + log_evidence).logsumexp(-1)  # (P,)
log_posterior = log_prior + log_evidence - log_z[:, None]
assert torch.allclose(log_posterior.exp().sum(-1), torch.ones(len(toy.prompts), dtype=log_posterior.dtype), atol=1e-5)

best = log_posterior[0].argsort(descending=True)[:5]
for index in best.tolist():
    print(
        f"{toy.completions[index]!r}: prior {log_prior[0, index].exp():.4f}, "
        f"posterior {log_posterior[0, index].exp():.4f}"
    )

# %% [markdown]
# ## The ELBO is below log Z, by the distance to the posterior
#
# For any policy: E[r]/β − KL(π‖π0) = log Z − KL(π‖π*). So the best possible value is known.

# %%
policy = toy.random_policy(noise=0.3, seed=2)
log_policy = toy.log_probs(policy)
probability = log_policy.exp()
elbo = (probability * (log_evidence - (log_policy - log_prior))).sum(-1)
distance = (probability * (log_policy - log_posterior)).sum(-1)
print("ELBO       ", elbo.tolist())
print("log Z      ", log_z.tolist())
print("difference ", (log_z - elbo).tolist())
print("KL(π‖π*)   ", distance.tolist())
assert torch.allclose(log_z - elbo, distance, atol=1e-4)

# %% [markdown]
# ## The same from samples
#
# A real model cannot be enumerated. Draws of the prior, weighted by exp(r/β), take the place of the sum; how many of
# them count is the effective sample size.

# %%
prior = LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)
posterior = prior.tilt(toy_reward, beta=beta)
draws = ImportanceSampler().sample(posterior, toy.prompts, n=256, generator=torch.Generator().manual_seed(0))
estimate, low, high = draws.log_z.log_z, draws.log_z.low, draws.log_z.high
for index, prompt in enumerate(toy.prompts):
    print(
        f"{prompt!r}: log Z {log_z[index]:.3f}, estimated {estimate[index]:.3f} "
        f"in [{low[index]:.3f}, {high[index]:.3f}]"
    )

# %% [markdown]
# ## β is part of the question
#
# Smaller β ask for more reward, further from the prior, and fewer draws count. At β → 0 a single completion is left.

# %%
drawn = prior.sample(toy.prompts, n=256, generator=torch.Generator().manual_seed(1))
rewards = torch.tensor(toy_reward(drawn.prompts, drawn.completions, drawn.completion_ids)).view(len(toy.prompts), -1)
for row in what_if(rewards, [2.0, 1.0, 0.5, 0.25, 0.1]):
    exact = (log_prior + toy.rewards / row.beta).softmax(-1)  # (P, N)
    print(
        f"β {row.beta:4}: reward {row.reward:5.2f} (exactly {(exact * toy.rewards).sum(-1).mean():5.2f}), "
        f"KL to the prior {row.kl_to_prior:4.2f} nats, {row.importance_ess:5.1f} of 256 draws count"
    )
assert importance_ess(rewards[0] / 0.1) < importance_ess(rewards[0] / 2.0)

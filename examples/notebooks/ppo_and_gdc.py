# %% [markdown]
"""
# PPO and GDC, to the same posterior

PPO minimises KL(π‖π*) and GDC any other f-divergence, here KL(π*‖π). The target is the same, so both head for the
same distribution. The model can be enumerated, and the distances are exact. Under a minute on one core.
"""

# %%
import tempfile
from pathlib import Path

from datasets import Dataset

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward

toy = EnumerableLM(vocab_size=5, max_completion_length=3)
folder = Path(tempfile.mkdtemp())
model = toy.save(folder / "model")
prompts = Dataset.from_dict({"prompt": toy.prompts})
start = toy.reverse_kl(toy.model).mean().item()
print(f"The prior is {start:.3f} nats from the posterior, log Z is {toy.log_z().mean():.3f}.")

# %% [markdown]
# Everything but the class is equal: the model, the reward, β, the number of completions.

# %%
common = {
    "beta": toy.beta,
    "learning_rate": 2e-3,
    "max_steps": 150,
    "per_device_train_batch_size": 48,
    "num_generations": 16,
    "max_completion_length": toy.max_completion_length,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 30,
    "disable_tqdm": True,
}


def train(trainer_class, config):
    """Train a policy on the toy, and return its trainer."""
    trainer = trainer_class(model=model, reward_funcs=toy_reward, args=config, train_dataset=prompts)
    trainer.train()
    return trainer


ppo = train(PPOTrainer, PPOConfig(output_dir=str(folder / "ppo"), **common))
gdc = train(GDCTrainer, GDCConfig(output_dir=str(folder / "gdc"), divergence="forward_kl", **common))

# %% [markdown]
# ## What is left
#
# The ELBO that each trainer logs rises towards log Z, and more steps bring it closer. The distances to the posterior
# are computed by enumeration.

# %%
for name, trainer in (("PPO", ppo), ("GDC", gdc)):
    elbos = [entry["posterior/elbo"] for entry in trainer.state.log_history if "posterior/elbo" in entry]
    print(f"{name}: ELBO", " → ".join(f"{elbo:.2f}" for elbo in elbos))
    reverse, forward = toy.reverse_kl(trainer.model).mean(), toy.forward_kl(trainer.model).mean()
    print(
        f"     KL(π‖π*) {reverse:.4f}, KL(π*‖π) {forward:.4f} nats, total variation {toy.tv(trainer.model).mean():.3f}"
    )
    assert reverse < 0.5 * start

# %% [markdown]
# The two policies are close to each other as well, since both are close to the same third one.

# %%
between = 0.5 * (toy.log_probs(ppo.model).exp() - toy.log_probs(gdc.model).exp()).abs().sum(-1)
print("total variation between the two, by prompt:", [round(value, 3) for value in between.tolist()])

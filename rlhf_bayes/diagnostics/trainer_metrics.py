"""The metrics that the trainers log besides TRL's, one record each: unit and meaning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerMetric:
    """A metric in the logs of a training."""

    unit: str
    """The unit, such as "nats per sequence"."""
    meaning: str
    """How to read it, in Markdown."""


TRAINER_METRICS: dict[str, TrainerMetric] = {
    "posterior/kl_to_prior": TrainerMetric(
        "nats per sequence",
        "KL(πθ‖π0), as the sum of the exact KLs of each token: unbiased, less noise than log-ratios, never "
        "negative ([Amini et al. 2025](https://arxiv.org/abs/2504.10637)). Under FSDP the mean log-ratio, which may "
        "dip below 0",
    ),
    "posterior/elbo": TrainerMetric(
        "nats per sequence",
        "E[r]/β − KL(πθ‖π0). What PPO maximises; rises to log Z. Comparable only at equal β",
    ),
    "posterior/log_z": TrainerMetric(
        "nats per sequence",
        "estimate of log Z from the `num_generations` completions of each prompt, by the jackknife; `GDCTrainer` "
        "pools all rollouts. With few completions it remains low, less so the closer to the posterior",
    ),
    "posterior/gap": TrainerMetric(
        "nats per sequence",
        "log Z − ELBO, an estimate of KL(πθ‖π*). 0 at the posterior. From 8 completions a prompt it is nearly "
        "unbiased, from 2 it reads 0 to 30 % low ([measured](real_models.md#the-trainers-own-gap))",
    ),
    "posterior/gap_standard_error": TrainerMetric("nats per sequence", "of the gap, that of one batch"),
    "posterior/importance_ess": TrainerMetric(
        "completions",
        "how many of the `num_generations` count; all of them at the posterior, 1 when one outweighs the rest",
    ),
    "posterior/forward_kl": TrainerMetric(
        "nats per sequence",
        "KL(π*‖πθ) on the batch, with log Z pooled over all batches. 0 at the posterior. `GDCTrainer` only; believe "
        "it where `gdc/step_ess` is 10 or more",
    ),
    "posterior/forward_kl_standard_error": TrainerMetric("nats per sequence", "of the forward KL"),
    "posterior/tv": TrainerMetric("from 0 to 1", "total variation from the posterior; `GDCTrainer` only, as above"),
    "posterior/tv_standard_error": TrainerMetric("from 0 to 1", "of the total variation"),
    "posterior/satisfaction": TrainerMetric("share", "completions that are not forbidden; `GDCTrainer` only"),
    "posterior/moments/<feature>": TrainerMetric("mean", "of a feature: compare with the mean that is asked for"),
    "posterior/khat": TrainerMetric("–", "tail of the weights p/q: trust below 0.7; `GDCTrainer` only"),
    "posterior/max_weight": TrainerMetric("share", "the largest of the weights p/q; `GDCTrainer` only"),
    "posterior/skipped_prompts": TrainerMetric(
        "share", "prompts of which no completion was ever allowed: nothing is learnt from them; `GDCTrainer` only"
    ),
    "gdc/step_ess": TrainerMetric("completions", "how many completions a step rests on"),
    "gdc/skipped_steps": TrainerMetric("share", "how often `ess_min` skipped a step"),
    "gdc/ratio_ess": TrainerMetric(
        "share", "effective sample size of the ratios π/q in a step; low: too many `num_iterations`"
    ),
    "gdc/clipped": TrainerMetric("share", "of the pseudo-reward that `max_pseudo_reward` took"),
    "gdc/beta": TrainerMetric("reward per nat", "the β that is being annealed with `beta_init`"),
    "gdc/proposal_replaced": TrainerMetric("share", 'how often `proposal="adaptive"` took a new proposal'),
    "actors/staleness": TrainerMetric(
        "optimizer steps", "age of the policy that drew a completion, when it is learnt from; with actors only"
    ),
    "actors/ess": TrainerMetric("share", "of the completions that the weights πθ/q of what actors drew leave"),
    "actors/waiting": TrainerMetric("share of time", "in which the learner waits for completions of actors"),
    "actors/dropped": TrainerMetric(
        "completions", "for each rollout, that were older than `max_staleness` and not learnt from"
    ),
    "engine/mismatch": TrainerMetric(
        "nats per sequence",
        "with vLLM or continuous batching: KL(q‖πθ) of what the engine draws, from the policy as the trainer has it. "
        "0 where both compute alike; above `max_engine_mismatch` the run stops",
    ),
    "engine/ess": TrainerMetric("share", "of the completions that the weights πθ/q of the engine's draws leave"),
    "engine/reward": TrainerMetric(
        "reward", "E[r] of the policy, by these weights; TRL's `reward` is the mean over what the engine drew"
    ),
    "ppo/explained_variance": TrainerMetric(
        "fraction", "of the returns, by the critic: 1 is perfect, 0 a constant, below 0 worse than none"
    ),
    "ppo/lam": TrainerMetric("–", "λ of GAE; without `lam`, lower the more the critic explains"),
    "ppo/value_loss": TrainerMetric("reward²", "falls as the critic learns; grows with the spread of the reward"),
    "ppo/policy_loss": TrainerMetric(
        "reward", "near 0 by construction; not a sign of progress. With `normalize_advantages` in standard deviations"
    ),
    "ppo/approx_kl": TrainerMetric(
        "nats per token", "how far the updates moved the policy from the one that drew the batch"
    ),
    "ppo/value_clip_fraction": TrainerMetric(
        "fraction of tokens", "how often `cliprange_value` took effect; high: lower the learning rate"
    ),
    "ppo/beta": TrainerMetric("reward per nat", "moves only with `target_kl`"),
    "step_kl": TrainerMetric(
        "nats per sequence",
        "KL(π‖π') of an optimizer step, from π before it to π' after it, on what the step learnt from. Where the "
        "learning rate is adapted, of each of the first 20 steps and then of every tenth; else of the fifth",
    ),
    "nonfinite_steps": TrainerMetric(
        "share of steps",
        "skipped, because the gradient was not finite; with fp16, whose scaler skips steps by itself, not logged",
    ),
}
"""Name -> record, in the order of the documentation. The trainers log `eval_…` of them in an evaluation."""

"""The probe of the prior: it prints, changes nothing in the training, and is not drawn where the prior is anyway."""

import pytest
import torch

from rlhf_bayes import GDCTrainer, PPOTrainer
from rlhf_bayes.testing import toy_reward

from ..training import config, gdc_config, logged, prompts_of, trainer, weights


@pytest.mark.parametrize("target_kl", [None, 0.5])
def test_a_training_is_the_same_with_and_without(toy, tmp_path, capsys, target_kl):
    found = []
    for probe in (0, 20):
        trained = trainer(toy, config(tmp_path, max_steps=3, prior_probe=probe, target_kl=target_kl))
        trained.train()
        found.append((weights(trained.model), logged(trained, "num_tokens"), logged(trained, "posterior/elbo")))
        assert ("nats from the prior" in capsys.readouterr().err) == bool(probe)
        draws = trained.alarms.prior
        # 3 batches of 8 for 20 of each of 3 prompts, and the first rollout, which the untrained policy draws
        assert len(draws) == (96 if probe else 24)
    (plain, *logs), (probed, *others) = found
    assert logs == others
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


def test_samples_of_the_prior_are_not_drawn_twice(toy, tmp_path, capsys):
    calls = []

    def counted(prompts, completions, **columns):
        calls.append(len(prompts))
        return toy_reward(prompts, completions, **columns)

    args = gdc_config(tmp_path, max_steps=1, prior_samples=32, prior_probe=32)
    trained = GDCTrainer(toy.random_policy(noise=0.0), counted, args, prompts_of(toy), processing_class=toy.tokenizer)
    trained.train()
    assert sum(calls) == 3 * 32 + 24  # and those of the step
    assert "of 32 draws of the prior" in " ".join(capsys.readouterr().err.split())


def test_no_posterior_no_probe(toy, tmp_path, capsys):
    trained = trainer(toy, config(tmp_path, max_steps=1, prior_probe=20, beta=0.0))
    trained.train()
    assert "prior:" not in capsys.readouterr().err


def test_it_must_not_be_negative(tmp_path):
    with pytest.raises(ValueError, match="`prior_probe` must be at least 0"):
        config(tmp_path, prior_probe=-1)


def test_a_collapse_ends_a_training_with_a_checkpoint(toy, tmp_path):
    args = config(
        tmp_path, max_steps=40, learning_rate=2.0, optim="adamw_torch", prior_probe=40, stop_on_collapse=True,
        save_strategy="steps", save_steps=1000,
    )  # fmt: skip
    trained = trainer(toy, args)
    assert isinstance(trained, PPOTrainer)
    with pytest.raises(RuntimeError, match="`stop_on_collapse` ended the training") as error:
        trained.train()
    step = trained.state.global_step
    assert 1 < step < 40
    assert (tmp_path / f"checkpoint-{step}").is_dir()
    assert f"Training stopped at step {step}" in "".join(error.value.__notes__)


def test_without_it_there_is_a_warning_and_the_training_goes_on(toy, tmp_path, caplog):
    trained = trainer(toy, config(tmp_path, max_steps=12, learning_rate=2.0, optim="adamw_torch", prior_probe=40))
    trained.train()
    assert trained.state.global_step == 12
    assert sum("`stop_on_collapse=True` ends a run" in record.message for record in caplog.records) in (1, 2)

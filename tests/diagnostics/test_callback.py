"""The callback in short trainings on the toy: TRL's trainers and ours."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.diagnostics import PosteriorCallback, evaluate
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.testing import toy_reward

TRAINERS = {
    "rloo": (RLOOTrainer, RLOOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "ppo": (PPOTrainer, PPOConfig),
}


@pytest.fixture
def posterior(toy):
    return LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length).tilt(toy_reward, toy.beta)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    return toy.save(tmp_path_factory.mktemp("prior"))


@pytest.fixture
def make_trainer(toy, folder, tmp_path):
    def make(name="rloo", **changes):
        trainer_class, config_class = TRAINERS[name]
        options = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "max_completion_length": 3,
            "num_generations": 4, "per_device_train_batch_size": 12, "per_device_eval_batch_size": 12, "beta": 0.5,
            "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        }  # fmt: skip
        dataset = Dataset.from_dict({"prompt": toy.prompts, "source": ["x", "y", "z"]})
        return trainer_class(
            model=folder, reward_funcs=toy_reward, args=config_class(**options | changes),
            train_dataset=dataset, eval_dataset=dataset, processing_class=toy.tokenizer,
        )  # fmt: skip

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_each_evaluation_is_logged_and_training_is_left_as_it_is(toy, posterior, make_trainer, name):
    trainer, plain = make_trainer(name), make_trainer(name)
    callback = PosteriorCallback(posterior, trainer, n=200)
    trainer.add_callback(callback)
    for each in (trainer, plain):
        set_seed(0)
        each.train()
    for (_, weight), (_, expected) in zip(
        trainer.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, expected)
    logged = [entry for entry in trainer.state.log_history if "eval_posterior_fit/gap" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert logged[0]["eval_posterior_fit/gap"] != logged[1]["eval_posterior_fit/gap"]
    assert {"eval_posterior_fit/forward_kl", "eval_posterior_fit/self_bleu"} <= logged[0].keys()
    assert logged[0]["eval_posterior_fit/trustworthy"] == 1.0
    # the model that was trained, judged in the usual way
    policy = LanguageModel(trainer.model, toy.tokenizer, toy.max_completion_length)
    again = evaluate(
        policy, posterior, toy.prompts, 200, torch.Generator().manual_seed(0), from_prior=callback.last.from_prior
    )
    assert again.policy.gap.mean == pytest.approx(logged[1]["eval_posterior_fit/gap"], abs=1e-5)
    off = (again.policy.gap.mean - toy.reverse_kl(trainer.model).mean().item()) / again.policy.gap.draws_standard_error
    assert abs(off) < 4
    # nothing of the trainer's own was logged twice
    assert sum("eval_reward" in entry for entry in trainer.state.log_history) == 2


def test_metrics_are_returned_and_reach_trackers(posterior, make_trainer):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer()
    trainer.add_callback(PosteriorCallback(posterior, trainer, n=30))
    trainer.add_callback(Tracker())
    metrics = trainer.evaluate()
    assert metrics["eval_posterior_fit/elbo"] <= metrics["eval_posterior_fit/log_z"] + 1.0
    assert "eval_reward" in metrics
    assert seen[-1]["eval_posterior_fit/elbo"] == metrics["eval_posterior_fit/elbo"]
    json.dumps(metrics, allow_nan=False)


def test_what_is_not_trustworthy_is_not_logged(posterior, make_trainer):
    trainer = make_trainer()
    trainer.add_callback(PosteriorCallback(posterior, trainer, n=5))
    metrics = trainer.evaluate()
    assert metrics["eval_posterior_fit/trustworthy"] == 0.0
    assert "eval_posterior_fit/elbo" in metrics
    assert not {"eval_posterior_fit/log_z", "eval_posterior_fit/gap", "eval_posterior_fit/tv"} & metrics.keys()


def test_prompts_of_the_evaluation_set_with_their_columns(toy, make_trainer):
    sources = []

    def reward(prompts, completion_ids, source, **columns):
        sources.append(source)
        return toy_reward(prompts, completion_ids, completion_ids)

    prior = LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)
    trainer = make_trainer()
    callback = PosteriorCallback(prior.tilt(reward, 0.5), trainer, n=2, max_prompts=2)
    trainer.add_callback(callback)
    trainer.evaluate()
    trainer.evaluate()
    assert callback.last.from_policy.prompts == toy.prompts[:2]
    assert sources == [["x", "x", "y", "y"]] * 3  # the policy twice, the prior once


def test_lora(toy, posterior, make_trainer):
    from peft import LoraConfig, get_peft_model

    trainer = make_trainer()
    model = get_peft_model(toy.random_policy(noise=0.0), LoraConfig(target_modules=["q_proj"], r=2))
    trainer = RLOOTrainer(
        model, toy_reward, trainer.args, train_dataset=trainer.train_dataset, eval_dataset=trainer.eval_dataset,
        processing_class=toy.tokenizer,
    )  # fmt: skip
    callback = PosteriorCallback(posterior, trainer, n=40)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.last.policy.kl_to_prior.mean > 0
    assert callback.last.prior.kl_to_prior.mean == 0


def test_refusals(toy, posterior, make_trainer):
    trainer = make_trainer()
    shorter = LanguageModel(toy.model, toy.tokenizer, 2).tilt(toy_reward, 0.5)
    with pytest.raises(ValueError, match="a prior with the trainer's `max_completion_length` = 3, got 2"):
        PosteriorCallback(shorter, trainer)
    hotter = LanguageModel(toy.model, toy.tokenizer, 3, temperature=2.0).tilt(toy_reward, 0.5)
    with pytest.raises(ValueError, match=r"a prior with the trainer's `temperature` = 1.0, got 2.0"):
        PosteriorCallback(hotter, trainer)
    thinking = make_trainer(chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ValueError, match=r"`chat_template_kwargs` = \{'enable_thinking': True\}, got \{\}: its chats"):
        PosteriorCallback(posterior, thinking)
    with pytest.raises(ValueError, match="`n` must be an integer of at least 2"):
        PosteriorCallback(posterior, trainer, n=1)
    with pytest.raises(ValueError, match="`max_prompts` must leave at least one prompt, got 0"):
        PosteriorCallback(posterior, trainer, max_prompts=0)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="`prompts` must be given"):
        PosteriorCallback(posterior, trainer)
    assert PosteriorCallback(posterior, trainer, prompts=["a"]).prompts == ["a"]

"""What is saved loads with plain transformers and PEFT, and a run that is resumed ends where it would have ended."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlhf_bayes.lm import Critic

from ..training import config, largest_change, prompts_of, trainer, weights

pytestmark = pytest.mark.slow

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make(toy, folder, peft=False, repeats=1, **changes):
    # rollouts of two micro-batches and two iterations: four steps each
    defaults = {
        "max_steps": 9,
        "per_device_train_batch_size": 12,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "target_kl": 0.05,
        "kl_horizon": 100,
        "logging_steps": 2,
    }
    args = config(folder, **defaults | changes)
    peft_config = LoraConfig(**LORA) if peft else None
    datasets = {"train_dataset": prompts_of(toy, repeats), "eval_dataset": prompts_of(toy)}
    return trainer(toy, args, peft_config=peft_config, **datasets)


def assert_same_run(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step
    resumed_weights, whole_weights = weights(resumed.model), weights(whole.model)
    assert resumed_weights.keys() == whole_weights.keys()
    for name, weight in whole_weights.items():
        assert torch.equal(resumed_weights[name], weight), name
    assert resumed.beta == whole.beta
    optimizers = [trained.optimizer.state_dict()["state"] for trained in (resumed, whole)]
    assert optimizers[0].keys() == optimizers[1].keys()
    for key, state in optimizers[1].items():
        for name, tensor in state.items():
            assert torch.equal(torch.as_tensor(optimizers[0][key][name]), torch.as_tensor(tensor)), (key, name)
    # the mean loss of the steps between two logs is Trainer's own, and starts anew after an interruption
    own = ("loss", "_runtime", "_per_second", "step_time", "total_flos")
    for ours, theirs in zip(resumed.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        for name, value in theirs.items():
            if not name.endswith(own):
                assert ours[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name


@pytest.mark.parametrize(
    ("critic", "peft"),
    [("ridge", False), ("shared", False), ("separate", False), ("shared", True), ("separate", True)],
)
def test_a_resumed_run_continues_bit_for_bit_in_the_middle_of_a_rollout(toy, tmp_path, critic, peft):
    whole = make(toy, tmp_path / "whole", peft, critic=critic)
    whole.train()
    assert whole.beta != 0.5
    resumed = make(toy, tmp_path / "resumed", peft, critic=critic)
    for parameter in (
        resumed.critic.parameters() if resumed.critic else ()
    ):  # nothing may depend on how the new trainer starts
        parameter.data.fill_(0.3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same_run(resumed, whole)
    # steps 6 to 8 go on with the rollout that the checkpoint holds: of the three, one is drawn after it
    assert [run.modes.count("train") for run in (whole, resumed)] == [3, 1]
    learns = {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}


def test_without_its_file_the_rollout_is_drawn_anew_and_said_so(toy, tmp_path, caplog):
    make(toy, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-5"
    for name in ("rollout_state_0.pt", "complete.json"):  # as RLOOTrainer would have written it
        (checkpoint / name).unlink()
    resumed = make(toy, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "may have been cut short: `complete.json`" in caplog.text
    assert "rollout_state_0.pt` is missing" in caplog.text
    assert resumed.state.global_step == 9


def test_a_finished_checkpoint_can_be_trained_further(toy, tmp_path):
    make(toy, tmp_path, max_steps=5).train()
    longer = make(toy, tmp_path, max_steps=7)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_saved_policy_is_an_ordinary_model(toy, tmp_path, critic):
    trained = make(toy, tmp_path / "run", critic=critic, max_steps=5)
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-5"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            assert_close(toy.log_probs(model), toy.log_probs(trained.model))
            assert (toy.log_probs(model) - toy.log_prior).abs().max() > 1e-3
        tokenizers = (AutoTokenizer.from_pretrained(folder), toy.tokenizer)
        assert len({tuple(tokenizer(toy.prompts[2])["input_ids"]) for tokenizer in tokenizers}) == 1
        loaded = Critic.from_pretrained(folder / "critic")
        assert_close(weights(loaded), weights(trained.critic))
    assert trained.model.critic is trained.critic  # and it is still there


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_saved_adapter_is_an_ordinary_adapter(toy, tmp_path, critic):
    trained = make(toy, tmp_path / "run", peft=True, critic=critic, max_steps=5)
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-5"):
        model = PeftModel.from_pretrained(toy.random_policy(noise=0.0), folder)
        with torch.no_grad():
            assert_close(toy.log_probs(model), toy.log_probs(trained.model))
            assert (toy.log_probs(model) - toy.log_prior).abs().max() > 1e-4
        assert not any("critic" in name for name in weights(model))
        assert Critic.from_pretrained(folder / "critic").value_head.weight.abs().max() > 0


@pytest.mark.parametrize(("critic", "peft"), [("shared", False), ("separate", False), ("separate", True)])
def test_the_best_checkpoint_comes_back_with_its_critic(toy, tmp_path, critic, peft):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_num_tokens"}
    # the fewest tokens are the best: the first of two
    steps = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "greater_is_better": False, "learning_rate": 3e-2}
    trained = make(toy, tmp_path, peft, critic=critic, **best, **steps)
    snapshots = {}

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            snapshots[state.global_step] = weights(model)

    trained.add_callback(Snapshots())
    trained.train()
    assert trained.state.best_global_step == 2
    assert_close(weights(trained.model), snapshots[2], rtol=0, atol=0)
    assert largest_change(snapshots[2], snapshots[4], critic=True) > 0


def test_only_the_model_may_be_saved(toy, tmp_path):
    make(toy, tmp_path, critic="shared", save_only_model=True, max_steps=5).train()
    assert (tmp_path / "checkpoint-5" / "critic").is_dir()
    assert not (tmp_path / "checkpoint-5" / "rollout_state_0.pt").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"steps_per_generation": 4}, {"steps_per_generation": 2}, "`steps_per_generation` = 4 (now 2)"),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
            {"steps_per_generation": 8, "gradient_accumulation_steps": 2},
            "`steps_per_generation` = 4 (now 8)",
        ),
        ({}, {"num_iterations": 1}, "`num_iterations` = 2 (now 1)"),
        ({}, {"temperature": 2.0}, "`temperature` = 1.0 (now 2.0)"),
    ],
)
def test_with_other_sizes_the_rollout_is_drawn_anew_and_said_so(toy, tmp_path, caplog, before, after, said):
    common = {"repeats": 4, "save_steps": 1, "eval_strategy": "no"}
    make(toy, tmp_path, **common | before | {"max_steps": 1}).train()
    resumed = make(toy, tmp_path, **common | before | after | {"max_steps": 4})
    drawn = []
    step = resumed.training_step

    def training_step(model, inputs, *args):
        loss = step(model, inputs, *args)
        drawn.append(len(getattr(resumed, "rollouts", [])))
        return loss

    resumed.training_step = training_step
    resumed.train(resume_from_checkpoint=True)
    assert f"The checkpoint was written with {said}: the rollout in flight is drawn anew" in caplog.text
    assert resumed.state.global_step == 4
    assert drawn[0] == 1, "the first step must learn from a rollout of this run"

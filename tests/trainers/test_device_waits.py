"""How often a step makes the host wait for the device: a fixed number of times, whatever the size of the batch."""

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from rlhf_bayes import GDCTrainer, PPOTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward

from .. import pretended_device as device
from ..pretended_device import counted_waits, pretended_device, uncounted
from .training import config, gdc_config, prompts_of

STEPS = 2
# trainer -> its configuration, waits of a step with its rollout, and further ones with a second micro-batch, where one
# forward becomes five: two of the policy and two of the prior, which score, and two that learn, less the first of all
KINDS = {
    # forwards of policy and prior, the columns of the alarms (2) and of the objective (2), the effective sample size,
    # log π for the advantages, the metrics, whether the gradient is finite
    "js": (gdc_config, {"divergence": "js"}, 10, 4 + 1),
    # the loss asks whether log π is finite; with several micro-batches the centres need forwards of their own
    "log_variance": (gdc_config, {"divergence": "log_variance"}, 12, 6 + 1),
    # instead of the columns of the objective: those of its metrics, the fit of its critic, and the critic's errors
    "ppo": (config, {}, 18, 4),
}
# where it is counted -> how trainers are made, how waits are counted, and how generation is left out. Torch may say of
# one operation on a GPU more than once that the host waits, hence the last number.
PLACES = {
    "pretended": (pretended_device, counted_waits, uncounted, 1),
    "cuda": (nullcontext, lambda *host: device.waits_of_gpu(), partial(device.sync_debug_mode, "default"), 2),
}


def waits_of(toy, folder, kind, place, **sizes):
    """Where this package waits in two steps with a rollout each, without generation."""
    make_config, options, _, _ = KINDS[kind]
    placed, counted, unheard, _ = PLACES[place]
    with placed():
        options = options | sizes | {"use_cpu": place != "cuda"}
        args = make_config(folder, max_steps=STEPS, optim="adamw_torch", logging_steps=STEPS, **options)
        trainer = PPOTrainer if kind == "ppo" else GDCTrainer
        data = (prompts_of(toy, 4), None, toy.tokenizer)
        trained = trainer(toy.random_policy(noise=0.0), toy_reward, args, *data)
        host = [trained.objective.critic.errors] if kind == "ppo" else []
        generate = trained._generate_single_turn
        with counted(*host) as waits:

            def unseen(*arguments):
                with unheard():
                    return generate(*arguments)

            trained._generate_single_turn = unseen
            trained.train()
    return waits.own


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_as_often_for_a_large_batch_as_for_a_small_one(kind, place, tmp_path):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    once, for_each = (PLACES[place][-1] * most for most in KINDS[kind][2:])
    small = waits_of(toy, tmp_path, kind, place, per_device_train_batch_size=8, num_generations=4)
    sizes = {"per_device_train_batch_size": 24, "num_generations": 8, "gradient_accumulation_steps": 2}
    large = waits_of(toy, tmp_path, kind, place, **sizes)
    assert sum(small.values()) <= STEPS * once, small
    assert sum(large.values()) <= sum(small.values()) + STEPS * for_each, (large, small)
    assert small  # at least the metrics are read


def test_the_pretended_device_notes_what_an_accelerator_would_wait_for():
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with counted_waits() as waits:
        for read in (x.item if x.numel() == 1 else x.sum().item, x.tolist, lambda: x[mask], lambda: bool(mask.any()),
                     mask.nonzero, x.cpu, lambda: x.new_tensor([1.0])):  # fmt: skip
            before = sum(waits.places.values())
            read()
            assert sum(waits.places.values()) == before + 1
        on_host = x.cpu()
        before = sum(waits.places.values())
        on_host.sum().item()  # which the host has already
        x[mask] = 0.0  # a fill
        on_host.to(x.device, non_blocking=True)
        assert sum(waits.places.values()) == before
        with pytest.raises(RuntimeError, match="tensors on the host and on the device"):
            on_host + x


def test_warnings_of_torch_are_counted_where_they_are_raised(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with device.waits_of_gpu() as waits:
        for _ in range(2):  # each time, though the place is the same
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    ((package, line),) = waits.places
    assert (package, waits.places[package, line]) == ("tests", 2)
    assert "test_warnings_of_torch_are_counted" in line
    assert modes == ["default", "warn", "default"]

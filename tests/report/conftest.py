"""A training run and a sampled one on disk, as TRL and `rlhf-bayes sample` write them, with known numbers."""

import json
import math

import pytest
from datasets import Dataset

from rlhf_bayes.report import write_sampling

HOSTILE = '<script>alert("x")</script>'


def elbo(step: int) -> float:
    return 2 - 1.5 * math.exp(-step / 20)


@pytest.fixture
def training_run(tmp_path):
    """60 steps of two rewards; completions of 3 steps, the last of which repeats itself."""
    folder = tmp_path / "ppo"
    (folder / "checkpoint-60").mkdir(parents=True)
    (folder / "checkpoint-9").mkdir()
    history = [
        {
            "step": step,
            "reward": 0.1 + step / 50,
            "posterior/kl_to_prior": step / 30,
            "posterior/elbo": elbo(step),
            "rewards/sentiment/mean": 0.2,
            "rewards/brevity/mean": -step / 50,
            "entropy": 1.5,
        }
        for step in range(1, 61)
    ]
    (folder / "checkpoint-60" / "trainer_state.json").write_text(
        json.dumps({"log_history": [*history, {"step": 60, "train_runtime": 3.0}]})
    )
    (folder / "checkpoint-9" / "trainer_state.json").write_text('{"log_history": []}')
    (folder / "completions").mkdir()
    texts = {10: ["a b c", "d e f"], 20: ["a b c", "d e g"], 60: [HOSTILE, HOSTILE]}
    for step, completions in texts.items():
        rows = {
            "step": [step] * 2,
            "prompt": ["The movie", "The movie"],
            "completion": completions,
            "sentiment": [0.25, 0.75],
            "advantage": [1.0, -1.0],
        }
        Dataset.from_dict(rows).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    return folder


@pytest.fixture
def controlled_run(tmp_path):
    """What recipes/gdc_dpg.py leaves: features with targets, evidence logged as a reward, forbidden completions."""
    history = [
        {
            "step": step,
            "reward": 3.0,
            "rewards/log_likelihood/mean": 3.0,
            "posterior/moments/animal": step / 20,
            "posterior/kl_to_prior": step / 10,
        }
        for step in range(1, 11)
    ]
    folder = tmp_path / "gdc"
    rows = [{"prompt": "The movie", "completion": " with a cat", "features": {"animal": 1.0}, "reward": None}]
    evaluation = {"policy": {"gap": {"mean": math.inf, "trustworthy": True}, "tv": {"mean": 0.25}}}
    sampling = {"beta": None, "reward_names": [], "moments": {"animal": 0.4}, "settings": {"beta": 0.05}}
    write_sampling(folder, rows, sampling, evaluation, [{"prompt": "The movie", "completion": " without"}])
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


@pytest.fixture
def sampled_run(tmp_path):
    """Posteriors of two β, one of which cannot be trusted; weighted draws."""
    folder = tmp_path / "sampled"
    folder.mkdir()
    trusted = {
        "beta": 0.5, "reward": 0.6, "reward_standard_error": 0.01, "kl_to_prior": 1.44,
        "kl_to_prior_standard_error": 0.02, "log_z": 2.25, "log_z_standard_error": 0.03, "importance_ess": 120.0,
        "khat": 0.31, "trustworthy": True,
    }  # fmt: skip
    sampling = {
        "beta": 0.5,
        "reward_names": ["brevity", "sentiment"],
        "settings": {"sampler": "ImportanceSampler", "beta": 0.5},
        "what_if": [trusted, {**trusted, "beta": 0.1, "importance_ess": 2.0, "khat": 1.2, "trustworthy": False}],
        "best_of_n": [{"n": n, "kl_to_prior": math.log(n) - (n - 1) / n, "reward": 0.1 * n} for n in (1, 2, 4)],
    }
    (folder / "sampling.json").write_text(json.dumps(sampling))
    rows = [
        {"prompt": "The movie", "completion": " never drawn", "reward": -1.0, "weight": 0.0},
        {"prompt": "The movie", "completion": " was great & good", "reward": 0.9, "weight": 0.9},
        {"prompt": "The hotel", "completion": " was fine", "reward": 0.4, "weight": 1.0},
    ]
    (folder / "draws.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

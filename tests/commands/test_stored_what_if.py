"""`rlhf-bayes sample --store`, and what `what-if` and `report` say of a store: by enumeration, without a model."""

import re

import pytest
import torch

from rlhf_bayes import commands
from rlhf_bayes.numerics import what_if
from rlhf_bayes.report import read_runs
from rlhf_bayes.report.run import STORE_FILE
from rlhf_bayes.report.stored_run import by_prompt
from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.completion_store import MANIFEST
from rlhf_bayes.store.stored_draws import StoredDraws

from ..store.stored import all_once, completion, drawn, provenance


@pytest.fixture(scope="module")
def sampled(toy, tmp_path_factory):
    """A store that the command wrote twice, by other seeds."""
    folder = tmp_path_factory.mktemp("sample")
    toy.save(folder / "model")
    for seed in ("0", "1"):
        commands.main(
            [
                "sample",
                *("--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "out"), "--seed", seed),
                *(flag for prompt in toy.prompts for flag in ("--prompt", prompt)),
                *("--reward_func", "rlhf_bayes.testing.enumerable:toy_reward", "--beta", "1.0"),
                *("--reward_clip_range", "-1", "1", "--sampler", "importance", "--num_samples", "150"),
                *("--max_completion_length", "3", "--store", str(folder / "store")),
            ]
        )
    return folder / "store"


def exact(toy, rewards, beta):
    log_posterior = toy.log_posterior(rewards / beta)
    return (log_posterior.exp() * rewards).sum(-1).mean().item(), toy.log_z(rewards / beta).mean().item()


def test_what_sample_stores_is_what_the_prior_drew(toy, sampled):
    store = CompletionStore(sampled)
    rows = store.read()
    assert len(rows) == 2 * 150 * len(toy.prompts)
    assert set(rows["drawn_by"]) == {"prior"}
    number = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    where = (
        torch.tensor([toy.prompts.index(prompt) for prompt in rows["prompt"]]),
        torch.tensor([number[tuple(ids)] for ids in rows["completion_ids"]]),
    )
    assert torch.allclose(torch.tensor(rows["log_prior"]).float(), toy.log_prior[where], atol=1e-4)
    # as the function returned them: the command clipped them for its own posterior only
    assert torch.allclose(torch.tensor(rows["reward/toy_reward"]).float(), toy.rewards[where], atol=1e-5)
    assert store.provenance.rewards == provenance(toy).rewards


def test_what_if_of_draws(toy, sampled, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    commands.main(["what-if", str(sampled), "--beta", "2", "1", "--reward_clip_range", "-1", "1.5"])
    printed = capsys.readouterr().out
    assert "900 completions of 3 prompts, 300 of each used; rewards: toy_reward" in printed
    for beta in (2.0, 1.0):
        (line,) = [line for line in printed.splitlines() if re.match(rf"\s*│?\s*{beta:g}\s", line)]
        reward, reward_error, _, _, log_z, log_z_error = map(float, re.findall(r"-?\d+\.\d{3}", line)[:6])
        expected = exact(toy, toy.rewards.clamp(-1, 1.5), beta)
        assert abs(reward - expected[0]) < 4.5 * reward_error + 1e-3
        assert abs(log_z - expected[1]) < 4.5 * log_z_error + 1e-3


def test_all_completions_once_are_exact(toy, tmp_path):
    draws = StoredDraws.of(all_once(toy, tmp_path / "store"))
    rewards, log_ratios = by_prompt(draws, draws.rewards(["toy_reward"]))
    for beta, found in zip((0.5, 2.0), what_if(rewards, (0.5, 2.0), log_ratios), strict=True):
        assert (found.reward, found.log_z) == pytest.approx(exact(toy, toy.rewards, beta), abs=1e-5)


def test_the_report_of_a_store(toy, sampled, tmp_path, capsys):
    assert STORE_FILE == MANIFEST
    (run,) = read_runs([sampled])
    assert len(run.samples) == 900
    assert run.reward_names == ["toy_reward"]
    assert len(run.sampling["what_if"]) == 7
    commands.main(["report", str(sampled), "--output_dir", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "What if β were another" in page
    assert "toy_reward" in page


@pytest.mark.parametrize("rows", ["none", "one of each"])
def test_too_few(toy, tmp_path, capsys, rows):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    if rows != "none":
        store.append(drawn(toy, toy.log_prior, 1, "prior"))
        store.append([completion(toy, 0, 1, -1.0, "prior", rewards={"toy_reward": None})])
    with pytest.raises(SystemExit):
        commands.main(["what-if", str(store.path)])
    assert ("at least 2 completions" if rows != "none" else "must hold completions") in capsys.readouterr().err


def test_no_store(tmp_path, capsys):
    with pytest.raises(SystemExit):
        commands.main(["what-if", str(tmp_path)])
    assert "must be a store" in capsys.readouterr().err

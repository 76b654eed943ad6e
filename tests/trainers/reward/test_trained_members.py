"""Members of an ensemble that learn together, against each of them alone under TRL; and annotators told apart."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from trl import RewardTrainer as TRLRewardTrainer

from rlhf_bayes import RewardTrainer

from ..preferring import LORA, VOTES, classifier, expanded, hard_pairs, quiet, trained, weights

pytestmark = pytest.mark.slow


def head_step_alone(toy, folder, rows, start):
    """The step that TRL's trainer takes from these weights of the head, on all rows at once."""
    alone = trained(TRLRewardTrainer, toy, quiet(folder, per_device_train_batch_size=len(rows)), rows, train=False)
    with torch.no_grad():
        alone.model.score.weight.copy_(start)
    alone.train()
    return alone.model.score.weight.detach()[0] - start


@pytest.mark.parametrize(
    "option", [{}, {"center_rewards_coefficient": 0.1}, {"label_smoothing": 0.2}, {"margin": True}, {"votes": True}]
)
def test_heads_alike_move_the_trunk_like_one(toy, tmp_path, option):
    option = dict(option)
    extra = {"margin": [0.3 * i for i in range(8)]} if option.pop("margin", False) else {}
    extra |= {"votes": VOTES} if option.pop("votes", False) else {}
    pairs = hard_pairs(toy, **extra)
    one = trained(RewardTrainer, toy, quiet(tmp_path / "one", ours=True, **option), pairs, train=False)
    args = quiet(tmp_path / "three", ours=True, num_members=3, bootstrap="none", **option)
    three = trained(RewardTrainer, toy, args, pairs, train=False)
    with torch.no_grad():
        three.model.score.weight.copy_(one.model.score.weight.expand(3, -1))
    start = one.model.score.weight.detach().clone()
    one.train()
    three.train()
    trunk = {name: weight for name, weight in weights(one.model).items() if "score" not in name}
    for name, weight in trunk.items():
        assert_close(weights(three.model)[name], weight, rtol=1e-4, atol=1e-6)
    # the loss is the mean over members, so each head goes a third of the way
    step = one.model.score.weight.detach() - start
    for head in three.model.score.weight.detach():
        assert_close(head - start[0], step[0] / 3, rtol=1e-4, atol=1e-6)


def test_heads_start_apart_and_the_first_as_in_trl(toy, tmp_path):
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True, num_members=4), hard_pairs(toy), train=False)
    heads = trainer.model.score.weight
    assert torch.equal(heads[0], classifier(toy, tmp_path / "again").score.weight[0])
    assert torch.pdist(heads.detach()).min() > 0.01
    assert trainer.model.config.num_labels == 4


def test_a_member_learns_its_bootstrap(toy, tmp_path):
    pairs = hard_pairs(toy)
    trainer = trained(RewardTrainer, toy, quiet(tmp_path / "k", ours=True, num_members=2), pairs, train=False)
    counts = torch.tensor(trainer.train_dataset["pair_weights"]).int()  # (N, K)
    assert not torch.equal(counts[:, 0], counts[:, 1])
    start = trainer.model.score.weight.detach().clone()
    trainer.train()
    for member in (0, 1):
        rows = pairs.select([i for i, count in enumerate(counts[:, member]) for _ in range(count)])
        step = head_step_alone(toy, tmp_path / f"alone{member}", rows, start[member])
        # a mean over the rows that were drawn, against one over all pairs and both members
        expected = step * len(rows) / len(pairs) / 2
        assert_close(trainer.model.score.weight.detach()[member] - start[member], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_among_others_learns_as_if_alone(toy, tmp_path, checkpointing):
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "gradient_checkpointing": checkpointing}
    pairs, lora = hard_pairs(toy, 16), LoraConfig(**LORA)
    args = quiet(tmp_path / "k", ours=True, num_members=3, ensemble="lora", bootstrap="none", **options)
    trainer = trained(RewardTrainer, toy, args, pairs, peft_config=lora, train=False)
    start = weights(trainer.model)
    starts = [start[f"base_model.model.score.modules_to_save.{name}.weight"] for name in trainer.index.members]
    assert torch.pdist(torch.cat(starts)).min() > 0.01
    trainer.train()
    for member in trainer.index.members:
        alone = trained(
            TRLRewardTrainer,
            toy,
            quiet(tmp_path / member, **options),
            pairs,
            peft_config=LoraConfig(**LORA),
            train=False,
        )
        theirs = dict(alone.model.named_parameters())
        for name, parameter in theirs.items():
            parameter.data.copy_(start[name.replace(".default.", f".{member}.")])
        alone.train()
        for name, weight in weights(trainer.model).items():
            if f".{member}." in name:
                assert_close(weight, weights(alone.model)[name.replace(f".{member}.", ".default.")], msg=name)


def test_annotators_are_dealt_out_to_the_members(toy, tmp_path):
    names = ["u", "v", "w", "x"]
    said = [["chosen", "rejected", "tie", "chosen"], ["rejected"] * 4] * 4
    pairs = hard_pairs(toy, annotators=[names] * 8, annotator_votes=said)
    args = quiet(tmp_path / "k", ours=True, num_members=2, bootstrap="annotators")
    trainer = trained(RewardTrainer, toy, args, pairs, train=False)
    groups = trainer._groups.tolist()
    assert sorted(groups) == [0, 0, 1, 1]
    start = trainer.model.score.weight.detach().clone()
    trainer.train()
    for member in (0, 1):
        own = [i for i, group in enumerate(groups) if group == member]
        votes = [[[s[i] for i in own].count(name) for name in ("chosen", "rejected", "tie")] for s in said]
        rows = expanded(hard_pairs(toy, votes=votes))
        step = head_step_alone(toy, tmp_path / f"alone{member}", rows, start[member])
        assert_close(trainer.model.score.weight.detach()[member] - start[member], step / 2, rtol=1e-3, atol=1e-6)


def test_error_rates_are_learnt(toy, tmp_path):
    rates = {"careful": 0.05, "careless": 0.45}
    generator = torch.Generator().manual_seed(0)
    pairs = hard_pairs(toy, 66)
    # the truth that a reward model can learn: the longer, then the alphabetically later text
    right = [(len(row["chosen"]), row["chosen"]) > (len(row["rejected"]), row["rejected"]) for row in pairs]
    names, said = [], []
    for better in right * 6:
        votes = []
        for rate in rates.values():
            errs = torch.rand((), generator=generator) < rate
            votes.append("chosen" if better != bool(errs) else "rejected")
        names.append(list(rates))
        said.append(votes)
    data = Dataset.from_dict(
        {
            "chosen": list(pairs["chosen"]) * 6, "rejected": list(pairs["rejected"]) * 6, "annotators": names,
            "annotator_votes": said,
        }
    )  # fmt: skip
    truth = ["chosen" if better else "rejected" for better in right * 6]
    options = {"optim": "adamw_torch", "learning_rate": 2e-2, "max_steps": 100, "per_device_train_batch_size": 32}
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True, annotator_reliability=True, **options), data)
    for position, name in enumerate(rates):
        votes = [votes[position] for votes in said]
        errors = sum(vote != true for vote, true in zip(votes, truth, strict=True))
        # what their votes show, and the prior's five votes; the model does not fit each pair
        share = (errors + 1) / (len(votes) + 5)
        tolerance = 4 * math.sqrt(share * (1 - share) / len(votes))
        assert trainer.annotator_error_rates[name] == pytest.approx(share, abs=tolerance)
    assert trainer.state.log_history[-2]["annotator_error_max"] > 0.3


def test_members_whose_adapters_would_change_the_base_of_the_others_are_refused(toy, tmp_path):
    args = quiet(tmp_path / "k", ours=True, num_members=2, ensemble="lora")
    lora = LoraConfig(**LORA, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="`init_lora_weights` must leave the base as it is for the members of"):
        trained(RewardTrainer, toy, args, hard_pairs(toy), peft_config=lora, train=False)


def test_an_initialisation_that_a_reload_cannot_repeat_is_refused(toy, tmp_path):
    lora = LoraConfig(**LORA, init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match="initialisation that PEFT repeats when it reads a saved adapter"):
        trained(RewardTrainer, toy, quiet(tmp_path, ours=True), hard_pairs(toy), peft_config=lora, train=False)

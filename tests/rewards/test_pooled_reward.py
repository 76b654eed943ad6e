"""Pooled rewards: centered prompt by prompt, on the enumerable toy where every mean is known."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.rewards import PooledReward, PromptCenters, RewardEnsemble, RewardScorer, prompt_centers

from .adapters import heads

RULES = {
    "pessimistic": {"beta": 0.5},
    "mean_minus_variance": {"penalty": 0.7},
    "min": {},
    "marginal": {"beta": 0.5},
}
CHAT = [{"role": "user", "content": "hi"}]


class Table:
    """Three members, each with a reward for every completion of the toy, plus a constant for each prompt."""

    __name__ = "table"

    def __init__(self, toy, constants):
        generator = torch.Generator().manual_seed(11)
        by_text = torch.randn(3, len(toy.prompts), len(toy.completions), generator=generator)
        self.rows = {prompt: row for row, prompt in enumerate(toy.prompts)}
        # two completions may have one text, with EOS and without: a reward model cannot tell them apart
        self.columns = {completion: column for column, completion in enumerate(toy.completions)}
        columns = [self.columns[completion] for completion in toy.completions]
        self.rewards = by_text[..., columns] + constants[..., None]  # (K, P, N)

    def member_rewards(self, prompts, completions):
        pairs = zip(prompts, completions, strict=True)
        return torch.stack([self.rewards[:, self.rows[p], self.columns[c]] for p, c in pairs], dim=1)


@pytest.fixture
def constants(toy):
    return torch.randn(3, len(toy.prompts), generator=torch.Generator().manual_seed(2)) * 2


def exact_centers(toy, table):
    means = (table.rewards * toy.log_prior.exp()).sum(-1)  # (K, P)
    return PromptCenters(toy.prompts, means.float())


def of_prompt(toy, reward, index):
    return reward.rewards([toy.prompts[index]] * len(toy.completions), toy.completions)


def test_a_constant_of_a_prompt_changes_no_preference_once_centered(toy, constants):
    plain, shifted = Table(toy, torch.zeros_like(constants)), Table(toy, constants)
    for rule, options in RULES.items():
        for index in range(len(toy.prompts)):
            one = of_prompt(toy, PooledReward(plain, rule, centers=exact_centers(toy, plain), **options), index)
            other = of_prompt(toy, PooledReward(shifted, rule, centers=exact_centers(toy, shifted), **options), index)
            # as the mean does: by the mean of the constants, which the posterior does not see
            assert_close(other - one, constants[:, index].mean().expand(len(one)), rtol=0, atol=1e-4)
            as_they_are = of_prompt(toy, PooledReward(shifted, rule, centers=False, **options), index)
            assert (as_they_are - other).std() > 0.1
    means = [of_prompt(toy, PooledReward(table, "mean"), 0) for table in (plain, shifted)]
    assert_close(means[1] - means[0], constants[:, 0].mean().expand(len(means[0])), rtol=0, atol=1e-4)


def test_a_pooled_reward_by_hand(toy, constants):
    table = Table(toy, constants)
    centers = exact_centers(toy, table)
    prompts, completions = [toy.prompts[1], toy.prompts[0]], toy.completions[:2]
    logged = {}
    reward = PooledReward(table, "pessimistic", beta=0.5, centers=centers)
    rewards = reward(prompts, completions, completion_ids=[[1], [2]], log_metric=logged.__setitem__)
    spreads = []
    for row, (index, column) in enumerate([(1, 0), (0, 1)]):
        means = [(table.rewards[k, index].double() @ toy.log_prior[index].double().exp()).item() for k in range(3)]
        centered = [table.rewards[k, index, column].item() - means[k] for k in range(3)]
        pooled = -0.5 * math.log(sum(math.exp(-value / 0.5) for value in centered) / 3)
        assert rewards[row] == pytest.approx(pooled + sum(means) / 3, abs=1e-4)
        middle = sum(centered) / 3
        spreads.append(math.sqrt(sum((value - middle) ** 2 for value in centered) / 3))
    assert reward.__name__ == "table_pessimistic"
    assert logged == {"reward_spread": pytest.approx(sum(spreads) / 2, rel=1e-4)}


def test_centers_are_means_under_the_prior(toy, constants):
    table = Table(toy, constants)
    prior = LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)
    n = 400
    prompts = [toy.prompts[2], toy.prompts[0], toy.prompts[2]]
    generator = torch.Generator().manual_seed(3)
    centers = prompt_centers(table, prior, prompts, num_samples=n, generator=generator)
    assert len(centers) == 2
    exact, prior_probs = exact_centers(toy, table).of(prompts), toy.log_prior.exp()
    rewards = table.rewards[:, [2, 0, 2]]  # (K, 3, N)
    variances = ((rewards - exact[..., None]) ** 2 * prior_probs[[2, 0, 2]]).sum(-1)
    errors = (centers.of(prompts) - exact) / (variances / n).sqrt()
    assert errors.abs().max() < 5, f"off by {errors.abs().max():.1f} standard errors"
    again = prompt_centers(table, prior, prompts, num_samples=n, generator=torch.Generator().manual_seed(3))
    assert_close(again.means, centers.means)


def test_an_ensemble_pools_its_members(toy, llama, llama_tokenizer):
    ensemble = RewardEnsemble(heads(llama, 3), llama_tokenizer)
    prompts, completions = ["ab", "c", "ab"], ["cd", "de", "f"]
    rewards = ensemble.member_rewards(prompts, completions)  # (K, B)
    worst = ensemble.pooled("min", centers=False)
    assert_close(torch.tensor(worst(prompts, completions)), torch.stack([row.min() for row in rewards.T]))
    scorer = RewardScorer(worst)
    assert scorer.names == ["LlamaForSequenceClassification_min"]
    assert_close(scorer(prompts, completions, [[1]] * 3)[:, 0], rewards.amin(0))


def test_chats_are_prompts_too():
    centers = PromptCenters([CHAT, "hi"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    reordered = [{"content": "hi", "role": "user"}]
    assert_close(centers.of(["hi", reordered]), torch.tensor([[2.0, 1.0], [4.0, 3.0]]))


def test_a_prompt_without_a_center_is_refused(toy, constants):
    table = Table(toy, constants)
    centers = PromptCenters(toy.prompts[:1], torch.zeros(3, 1))
    with pytest.raises(
        ValueError, match=r"2 of 3 are missing, the first .*`prompt_centers\(ensemble, prior, prompts\)`"
    ):
        PooledReward(table, "min", centers=centers).rewards(toy.prompts, toy.completions[:3])
    with pytest.raises(ValueError, match="each of the 3 members, got 2"):
        PooledReward(table, "min", centers=PromptCenters(toy.prompts, torch.zeros(2, 3))).rewards(
            toy.prompts, toy.completions[:3]
        )


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        ("median", {}, ValueError, "`rule` must be one of"),
        ("pessimistic", {"centers": False}, ValueError, "`beta` must be given"),
        ("min", {"beta": 0.5, "centers": False}, ValueError, "`beta` must be left out"),
        ("min", {}, ValueError, "`centers` must be given for the rule 'min'"),
        ("mean", {"centers": PromptCenters(["a"], torch.zeros(2, 1))}, ValueError, "`centers` must be left out"),
        ("min", {"centers": True}, TypeError, "PromptCenters, False or None, got True"),
        ("min", {"centers": {"a": 1.0}}, TypeError, "PromptCenters, False or None"),
    ],
)
def test_arguments_that_do_not_fit_the_rule_are_refused(toy, constants, rule, options, error, message):
    with pytest.raises(error, match=message):
        PooledReward(Table(toy, constants), rule, **options)


@pytest.mark.parametrize("means", [torch.zeros(2), torch.zeros(2, 3), torch.tensor([[0.0, math.nan]])])
def test_centers_of_another_shape_are_refused(means):
    with pytest.raises(ValueError, match=r"of shape \(K, P\) with P = 2 prompts"):
        PromptCenters(["a", "b"], means)

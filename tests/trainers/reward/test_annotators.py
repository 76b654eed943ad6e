"""Error rates of annotators: the window, the prior, several processes."""

import math

import pytest
import torch

from rlhf_bayes.trainers.reward.annotators import AnnotatorReliability


class OneProcess:
    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor


class TwinProcesses(OneProcess):
    """Another process that sees the same votes."""

    def reduce(self, tensor, reduction):
        return 2 * super().reduce(tensor, reduction)


def test_rates_start_at_the_prior():
    assert AnnotatorReliability(["a", "b"], 10).rates() == {"a": pytest.approx(0.2), "b": pytest.approx(0.2)}


def test_a_step_takes_in_the_expected_errors_of_those_who_voted():
    reliability = AnnotatorReliability(["a", "b", "c"], 1_000_000)
    ids = torch.tensor([[0, 1], [0, -1]])
    reliability.add(ids, torch.tensor([[0.9, 0.1], [0.6, 0.7]]), ids >= 0)
    reliability.add(ids[:1], torch.tensor([[1.0, 0.0]]), ids[:1] >= 0)
    assert reliability.error_rate.tolist() == pytest.approx([0.2] * 3)  # not before the step
    reliability.step(OneProcess())
    expected = [(2.5 + 1) / (3 + 5), (0.1 + 1) / (2 + 5), 1 / 5]
    assert reliability.error_rate.tolist() == pytest.approx(expected, rel=1e-4)


def test_processes_add_up():
    one, two = AnnotatorReliability(["a", "b"], 50), AnnotatorReliability(["a", "b"], 50)
    ids, errors = torch.tensor([[0], [1]]), torch.tensor([[0.3], [0.8]])
    for _ in range(2):
        one.add(ids, errors, ids >= 0)
    two.add(ids, errors, ids >= 0)
    one.step(OneProcess())
    two.step(TwinProcesses())
    assert one.rates() == pytest.approx(two.rates())


def test_a_vote_that_two_members_see_counts_once():
    one, shared = AnnotatorReliability(["a", "b"], 50), AnnotatorReliability(["a", "b"], 50)
    ids = torch.tensor([[0, 1]])
    one.add(ids, torch.tensor([[0.3, 0.8]]), ids >= 0)
    for errors in ([[0.1, 0.9]], [[0.5, 0.7]]):
        shared.add(ids, torch.tensor(errors), ids >= 0, share=0.5)
    one.step(OneProcess())
    shared.step(OneProcess())
    assert shared.rates() == pytest.approx(one.rates())


def test_the_window_is_one_pass():
    reliability = AnnotatorReliability(["a", "b"], 100)
    ids = torch.tensor([[0], [1]])
    for _ in range(400):
        reliability.add(ids, torch.tensor([[0.5], [0.0]]), ids >= 0)
        reliability.step(OneProcess())
    # a geometric series of steps of two votes
    votes = 1 / (1 - math.exp(-2 / 100))
    assert reliability.error_rate.tolist() == pytest.approx(
        [(0.5 * votes + 1) / (votes + 5), 1 / (votes + 5)], rel=1e-3
    )


def test_state_goes_on():
    first = AnnotatorReliability(["a", "b"], 100)
    ids = torch.tensor([[0], [1]])
    first.add(ids, torch.tensor([[0.5], [0.0]]), ids >= 0)
    first.step(OneProcess())
    second = AnnotatorReliability(["a", "b"], 100)
    second.load_state_dict(first.state_dict())
    assert second.rates() == first.rates()
    with pytest.raises(ValueError, match="must be resumed with the annotators of its data, 2 in number; got 3"):
        AnnotatorReliability(["a", "b", "c"], 100).load_state_dict(first.state_dict())


def test_one_annotator_is_refused():
    with pytest.raises(ValueError, match=r"at least two annotators, got \['a'\].*Use `label_smoothing`"):
        AnnotatorReliability(["a"], 10)

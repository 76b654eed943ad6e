"""One line where an object is printed, and a table of escaped cells in a notebook."""

import pytest

from rlhf_bayes.likelihoods import Constraint, ProductLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.notebook import Described, html_table, in_short, shortened
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.testing import toy_reward


def allowed(completions, **columns):
    return [True] * len(completions)


@pytest.fixture(scope="module")
def prior(toy):
    return LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)


def test_a_language_model_and_its_posteriors(prior):
    parameters = sum(p.numel() for p in prior.model.parameters())
    text = repr(prior)
    of = f"kind='LlamaForCausalLM', parameters='{parameters:,}', max_completion_length=3, temperature=1"
    assert text == f"LanguageModel({of})"
    reward = repr(prior.tilt(toy_reward, 0.5, reward_clip_range=(-1, 2)))
    assert reward == (
        f"Posterior(prior={text}, likelihood=RewardLikelihood(rewards=['toy_reward'], beta=0.5, "
        "reward_clip_range=[-1, 2]), bound=4)"
    )
    both = repr(prior.tilt(toy_reward, 0.5).condition(allowed).likelihood)
    assert both == (
        "ProductLikelihood(likelihoods=[RewardLikelihood(rewards=['toy_reward'], beta=0.5), "
        "Constraint(predicate='allowed')])"
    )


def test_completions_and_evidence_of_the_users_own(prior):
    drawn = prior.sample(["a", "a b"], 3)
    assert repr(drawn).startswith("Completions(rows=6, ended=")

    class Mine:
        def log_likelihood(self, *args):
            raise AssertionError

    assert "likelihood=Mine()" in repr(Posterior(prior, Mine()))
    assert "powers=[2]" in repr(ProductLikelihood([Constraint(allowed)], [2.0]))


def test_a_table_escapes_and_leaves_out_what_is_none():
    class Box(Described):
        def _facts(self):
            return {"text": "<b>", "nothing": None, "number": 0.123456}

    assert repr(Box()) == "Box(text='<b>', number=0.1235)"
    page = Box()._repr_html_()
    assert "&lt;b&gt;" in page
    assert "nothing" not in page
    assert "<p>1 &lt; 2</p>" in html_table(("a",), [("b",)], note="1 < 2")


def test_values_in_short():
    assert in_short({"a": 1.0, "b": [0.5]}) == "{'a': 1, 'b': [0.5]}"
    assert shortened("x\n" * 100) == "x " * 39 + "x…"

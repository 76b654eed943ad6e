"""Prefixes in one pass of a causal classifier: against each text by itself, and not taken where they would differ."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.testing import assert_close
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_bayes.likelihoods import ClassifierLikelihood, EnsembleLikelihood, ProductLikelihood, RewardLikelihood
from rlhf_bayes.likelihoods.likelihood import known_prefixes, prefix_log_likelihood
from rlhf_bayes.rewards import RewardEnsemble, RewardModel, TextClassifier, takes_prefixes
from rlhf_bayes.rewards.token_trees import in_batches, shared_beginnings, token_trees

from .adapters import adapters, heads, one_at_a_time, saved_base

PROMPTS = ["ab"] * 5 + ["fade"] * 3
PREFIXES = ["c", "cd", "cda", "cdaf", "cdafe", "d", "de", "dea"]
TEXTS = [prompt + prefix for prompt, prefix in zip(PROMPTS, PREFIXES, strict=True)]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
REPLIES = [[{"role": "assistant", "content": text}] for text in PREFIXES]


def read_once(score, *arguments):
    with shared_beginnings():
        return score(*arguments)


def sizes_of_passes(model):
    """Filled with the shape of what the model reads at each call."""
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def test_a_tree_holds_each_text_once():
    rows = [[5, 6, 9], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6, 7, 8], [1, 2], [1]]
    first, second = token_trees(rows)
    assert (len(first.ids), len(second.ids)) == (6, 2)  # 5 6 9, and 7 9 8 after 6; 1 2
    assert second.ends == [1, 0]
    for tree, texts in ((first, rows[:4]), (second, rows[4:])):
        sees, positions = tree.sees(), tree.positions()
        for end, text in zip(tree.ends, texts, strict=True):
            nodes = sees[end].nonzero().flatten().tolist()
            assert [tree.ids[node] for node in nodes] == text
            assert [positions[node] for node in nodes] == list(range(len(text)))
    assert [len(tree.ids) for tree in token_trees(rows[:4], most_nodes=5)] == [5, 4]


def test_masks_of_a_batch_stay_within_bounds():
    trees = list(token_trees([[row] * 3 for row in range(5)]))
    assert [len(batch) for batch in in_batches(trees, 18)] == [2, 2, 1]
    assert [len(batch) for batch in in_batches(trees, 1)] == [1] * 5


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_logits_are_those_of_each_text_by_itself(llama, llama_tokenizer, num_labels):
    model = heads(llama, num_labels)
    expected = torch.stack([one_at_a_time(model, llama_tokenizer, TEXTS, x) for x in range(num_labels)], dim=1)
    classifier = TextClassifier(model, llama_tokenizer)
    assert classifier.reads_trees
    sizes = sizes_of_passes(model)
    assert_close(read_once(classifier.logits, PROMPTS, PREFIXES), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [(2, 7)]  # two trees, of "abcdafe" and "fadedea", and no row for their prefixes
    assert_close(classifier.logits(PROMPTS, PREFIXES), expected, rtol=1e-4, atol=1e-5)
    assert sizes[1:] == [(8, 7)]
    assert read_once(classifier.logits, [], []).shape == (0, num_labels)


@pytest.mark.parametrize("padding", ["?", None])
@pytest.mark.parametrize("form", ["chat", "with EOS"])
def test_what_closes_a_text_is_read_after_each_prefix(llama, llama_tokenizer, form, padding):
    """Also where EOS is the padding token, which transformers' pooling passes over."""
    llama_tokenizer.pad_token, llama_tokenizer.padding_side = padding, "left"
    classifier = TextClassifier(llama, llama_tokenizer, append_eos=form != "chat")
    if form == "chat":
        arguments, texts = (CHATS, REPLIES), [f"u{p}$a{x}$" for p, x in zip(PROMPTS, PREFIXES, strict=True)]
    else:
        arguments, texts = (PROMPTS, PREFIXES), [f"{text}$" for text in TEXTS]
    expected = one_at_a_time(llama, llama_tokenizer, texts)
    without_closing = one_at_a_time(llama, llama_tokenizer, [text[:-1] for text in texts])
    assert ((expected - without_closing).abs() > 1e-3).tolist() == [padding is not None] * 8
    sizes = sizes_of_passes(llama)
    assert_close(read_once(classifier.logits, *arguments)[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert [rows for rows, _ in sizes[-1:]] == [2]


def test_a_prefix_whose_tokens_differ_from_the_whole_text_is_read_with_its_own(llama):
    vocabulary = {token: number for number, token in enumerate(["[P]", *"abcdef", "ab", "abc", "cd"])}
    merges = [("a", "b"), ("ab", "c"), ("c", "d")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, merges)), pad_token="[P]")
    prefixes = ["a", "ab", "abc", "abcd", "abcdc", "abcdcd"]
    rows = [tokenizer(f"f{prefix}")["input_ids"] for prefix in prefixes]
    assert any(row != rows[-1][: len(row)] for row in rows)
    with torch.no_grad():
        expected = torch.cat([llama.eval()(input_ids=torch.tensor([row])).logits for row in rows])  # (N, 1)
    classifier = TextClassifier(llama, tokenizer)
    found = read_once(classifier.logits, ["f"] * 6, prefixes)
    assert classifier.reads_trees
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


class ReadsLaterTokens(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask, **kwargs):
        if attention_mask.ndim == 2:
            attention_mask = torch.where(attention_mask.bool(), 0.0, -1e9)[:, None, None].expand(
                -1, 1, input_ids.size(1), -1
            )
        return super().forward(input_ids, attention_mask, **kwargs)


class PoolsAllTokens(LlamaForSequenceClassification):
    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        real = (input_ids != self.config.pad_token_id)[..., None]
        states = self.model(input_ids, **kwargs).last_hidden_state
        output.logits = self.score((states * real).sum(1) / real.sum(1))
        return output


class TakesNoPositions(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("kind", [ReadsLaterTokens, PoolsAllTokens, TakesNoPositions, "bert", "constant"])
def test_models_that_would_give_other_scores_are_found_out_and_read_text_by_text(
    llama, llama_tokenizer, bert, bert_tokenizer, kind
):
    llama_tokenizer.pad_token = "?"
    model, tokenizer = (bert, bert_tokenizer) if kind == "bert" else (llama, llama_tokenizer)
    if isinstance(kind, type):
        model = kind(llama.config)
        model.load_state_dict(llama.state_dict())
    reward = RewardModel(model, tokenizer)
    assert reward.takes_prefixes == (kind == "constant")  # the causal model itself
    assert_close(
        torch.tensor(read_once(reward, PROMPTS, PREFIXES)),
        torch.tensor(reward(PROMPTS, PREFIXES)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", ["heads", "adapters", "models"])
def test_members_of_an_ensemble_read_prefixes_in_one_pass(llama, llama_tokenizer, tmp_path, kind):
    llama_tokenizer.pad_token = "?"
    if kind == "heads":
        ensemble = RewardEnsemble(heads(llama, 3), llama_tokenizer)
    elif kind == "adapters":
        ensemble = RewardEnsemble(adapters(saved_base(llama, llama_tokenizer, tmp_path), 3), llama_tokenizer)
    else:
        ensemble = RewardEnsemble([heads(llama, 1), llama], llama_tokenizer)
    ensemble.normalize(PROMPTS, PREFIXES)
    pooled = ensemble.pooled("min", centers=False)
    assert all(reward.takes_prefixes for reward in (ensemble, pooled, ensemble.member(1)))
    sizes = [sizes_of_passes(classifier.model) for classifier in ensemble.classifiers]
    found = read_once(ensemble.member_rewards, PROMPTS, PREFIXES)
    assert {size for of_one in sizes for size in of_one} == {(2, 7)}
    assert_close(found, ensemble.member_rewards(PROMPTS, PREFIXES), rtol=1e-4, atol=1e-4)
    assert_close(read_once(pooled.rewards, PROMPTS, PREFIXES), found.amin(0))


def test_evidence_gives_the_part_that_takes_prefixes(llama, llama_tokenizer):
    llama_tokenizer.pad_token = "?"
    model = RewardModel(llama, llama_tokenizer)

    @takes_prefixes
    def count(completions, shift, **columns):
        return [None if text == "c" else text.count("d") + s for text, s in zip(completions, shift, strict=True)]

    def whole_texts_only(completions, **columns):
        raise AssertionError("called on prefixes")

    def like(completions, **columns):
        return [float(len(text)) for text in completions]

    rewards = RewardLikelihood(
        [model, whole_texts_only, count], 0.5, reward_weights=[2.0, 1.0, -1.0], reward_clip_range=(-3.0, 3.0)
    )
    classifier = ClassifierLikelihood(heads(llama, 2), 1, llama_tokenizer)
    ensemble = EnsembleLikelihood(RewardEnsemble(heads(llama, 3), llama_tokenizer), 2.0)
    unasked = RewardLikelihood(like, 1.0)
    product = ProductLikelihood([rewards, unasked, classifier, ensemble], [0.5, 1.0, 2.0, 1.0])
    assert [known_prefixes(x) for x in (rewards, unasked, classifier, ensemble, product)] == [1, 0, 1, 1, 1]
    shift = [float(number) for number in range(8)]
    arguments = (PROMPTS, PREFIXES, [[1]] * 8, {"shift": shift})
    counts = torch.tensor([0.0, *(text.count("d") + s for text, s in zip(PREFIXES[1:], shift[1:], strict=True))])
    of_rewards = (2 * torch.tensor(model(PROMPTS, PREFIXES)) - counts).clamp(-3, 3) / 0.5
    expected = (
        0.5 * of_rewards + 2 * classifier.log_likelihood(*arguments[:2]) + ensemble.log_likelihood(*arguments[:2])
    )
    assert_close(read_once(prefix_log_likelihood, product, *arguments), expected, rtol=1e-4, atol=1e-4)

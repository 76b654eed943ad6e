"""Every critic a policy can get: where its trunk comes from, that it learns, and that it is saved."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_bayes.lm import Critic
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.trainers.ppo.attach_critic import attach_critic

from ..training import config, trainer, weights

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def reward_model(toy, hidden_size=16, vocab_size=None):
    torch.manual_seed(7)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=vocab_size or toy.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            initializer_range=0.5,
            pad_token_id=toy.tokenizer.pad_token_id,
        )
    )


def letter_tokenizer():
    """A token a character, unlike the toy's words: what a reward model reads need not be what the policy writes."""
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2, "<pad>": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="?", eos_token="?")


def words(toy):
    """The toy's tokenizer, forgiving: prompt and completion joined without a space make a word it does not know."""
    tokenizer = copy.deepcopy(toy.tokenizer)
    tokenizer.backend_tokenizer.model.unk_token = "a"
    return tokenizer


def make(toy, tmp_path, critic, source=None, peft=False, **changes):
    arguments = {"peft_config": LORA} if peft else {}
    reward_funcs = toy_reward
    if source == "value_model":
        arguments["value_model"] = toy.random_policy(noise=0.1, seed=4)
    elif source == "path":
        reward_model(toy).save_pretrained(tmp_path / "value")
        arguments["value_model"] = str(tmp_path / "value")
    elif source == "reward":
        reward_funcs = [toy_reward, reward_model(toy)]
        # a shared critic takes no trunk, so there the reward model may read other tokens
        arguments["reward_processing_classes"] = [None, letter_tokenizer() if critic == "shared" else words(toy)]
    args = config(tmp_path / "out", critic=critic, **changes)
    return trainer(toy, args, None, reward_funcs, **arguments)


CRITICS = [
    ("shared", None, False, "shared", 32),
    ("shared", None, True, "shared", 32),
    ("separate", None, False, "backbone", 32),
    ("separate", "value_model", False, "backbone", 32),
    ("separate", "path", False, "backbone", 16),
    ("separate", "reward", False, "backbone", 16),
    ("separate", None, True, "adapter", 32),
    ("separate", "path", True, "backbone", 16),
]


@pytest.mark.parametrize(("critic", "source", "peft", "trunk", "hidden_size"), CRITICS)
def test_it_starts_at_zero_learns_and_is_saved(toy, tmp_path, critic, source, peft, trunk, hidden_size):
    trained = make(toy, tmp_path, critic, source, peft, max_steps=3, learning_rate=0.3, vf_coef=1.0)
    before = weights(trained.model)
    trained.train()
    assert trained.rollouts[0].values.abs().max() == 0
    assert trained.rollouts[-1].values.abs().max() > 0
    after = weights(trained.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {
        "shared": [".critic.value_head.weight"],
        "backbone": [".critic.value_head.weight", ".critic.backbone."],
        "adapter": [".critic.value_head.weight", "lora_B.critic."],
    }
    for part in parts[trunk]:
        assert any(part in f".{name}" for name in changed), f"{part} did not learn"
    assert any("critic" not in name for name in changed)
    if peft:
        assert not any("base_layer" in name or "embed_tokens" in name for name in changed if "critic" not in name)
    if source == "reward":  # a copy: the reward must not move
        assert_close(weights(trained.reward_funcs[1]), weights(reward_model(toy)))

    trained.save_model(str(tmp_path / "saved"))
    folder = tmp_path / "saved" / "critic"
    described = json.loads((folder / "critic_config.json").read_text())
    assert described == {
        "trunk": trunk,
        "hidden_size": hidden_size,
        "adapter": "critic" if trunk == "adapter" else None,
    }
    loaded = Critic.from_pretrained(folder)
    assert_close(loaded.value_head.weight, trained.critic.value_head.weight)
    assert_close(loaded.value_head.bias, trained.critic.value_head.bias)
    if trunk == "backbone":
        assert_close(weights(loaded.backbone), weights(trained.critic.backbone))
        AutoModel.from_pretrained(folder)  # an ordinary trunk


def test_a_separate_critic_of_a_full_policy_is_a_copy_that_leaves_the_policy_alone(toy, tmp_path):
    trained = make(toy, tmp_path, "separate")
    assert_close(weights(trained.critic.backbone), weights(toy.random_policy(0.0).base_model))
    own = {id(parameter) for parameter in trained.critic.parameters()}
    policy = {id(p) for name, p in trained.model.named_parameters() if "critic." not in name}
    assert not own & policy
    recorded = []
    trained.model.model.layers[0].register_full_backward_hook(lambda *_: recorded.append(1))
    score = trained.critic(trained.model, torch.zeros(1, 32), torch.tensor([0]), {"input_ids": torch.tensor([[0, 1]])})
    score.sum().backward()
    assert recorded == []


def test_processes_that_draw_differently_start_from_the_same_adapter(toy):
    starts, next_draws = [], []
    for process in range(2):
        policy = get_peft_model(toy.random_policy(noise=0.1), LORA)
        torch.manual_seed(process)
        attach_critic(policy, toy.tokenizer, "separate", None, [], seed=3)
        starts.append({name: tensor for name, tensor in policy.state_dict().items() if ".critic." in name})
        next_draws.append(torch.rand(()))
    assert any("lora_A" in name and tensor.any() for name, tensor in starts[0].items())
    assert_close(starts[0], starts[1], rtol=0, atol=0)
    assert next_draws[0] != next_draws[1]


@pytest.mark.parametrize(("critic", "peft"), [("shared", False), ("shared", True), ("separate", False)])
def test_training_goes_on_from_a_saved_critic(toy, tmp_path, critic, peft):
    first = make(toy, tmp_path, critic, None, peft, max_steps=2, learning_rate=0.3, vf_coef=1.0)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    second = trainer(
        toy,
        config(tmp_path, critic=critic),
        value_model=str(tmp_path / "saved" / "critic"),
        peft_config=LORA if peft else None,
    )
    assert second.critic.value_head.weight.abs().max() > 0
    assert_close(weights(second.critic), weights(first.critic))
    assert all(parameter.requires_grad for parameter in second.critic.parameters())


@pytest.mark.slow
def test_it_learns_what_a_prefix_is_worth(toy, tmp_path):
    # the policy stays put in the warm-up, so that the best explained variance is known
    changes = {"max_steps": 50, "learning_rate": 3e-2, "optim": "adamw_torch", "critic_warmup_steps": 50, "lam": 1.0}
    sizes = {"per_device_train_batch_size": 96, "num_generations": 32}
    trained = make(toy, tmp_path, "shared", **changes, **sizes)
    trained.train()
    explained = [entry["ppo/explained_variance"] for entry in trained.state.log_history if "loss" in entry]
    assert explained[0] == pytest.approx(0.0, abs=1e-5)
    p = toy.log_prior.exp()
    lengths = torch.tensor([len(ids) for ids in toy.completion_ids])
    weight = p * lengths / (p * lengths).sum()  # of a completion among tokens
    variance = (weight * toy.rewards**2).sum() - (weight * toy.rewards).sum() ** 2
    best = 1 - sum(_residual(toy, row) for row in range(3)) / (p * lengths).sum() / variance
    assert 0.3 * best < sum(explained[-20:]) / 20 < best + 0.1


def _residual(toy, row):
    """Σ over tokens of the variance that is left when each prefix's exact value is known."""
    mass, worth = {}, {}
    tokens = [
        (tuple(ids[:t]), p, r)
        for ids, p, r in zip(toy.completion_ids, toy.log_prior[row].exp(), toy.rewards[row], strict=True)
        for t in range(len(ids))
    ]
    for prefix, p, r in tokens:
        mass[prefix] = mass.get(prefix, 0.0) + p
        worth[prefix] = worth.get(prefix, 0.0) + p * r
    return sum(p * (r - worth[prefix] / mass[prefix]) ** 2 for prefix, p, r in tokens)


@pytest.mark.parametrize("kind", ["model", "path"])
def test_a_shared_critic_has_no_trunk_to_pass(toy, tmp_path, kind):
    with pytest.raises(ValueError, match="`value_model` must be a folder with a shared critic when `critic='shared'`"):
        make(toy, tmp_path, "shared", {"model": "value_model", "path": "path"}[kind])


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ("shared", "separate", "must be a critic with a trunk of its own when `critic='separate'`, got a shared one"),
        ("separate", "shared", "must be a folder with a shared critic when `critic='shared'`"),
    ],
)
def test_a_saved_critic_of_another_kind_is_refused(toy, tmp_path, saved, wanted, message):
    make(toy, tmp_path, saved).save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=message):
        trainer(toy, config(tmp_path, critic=wanted), value_model=str(tmp_path / "saved" / "critic"))


def test_a_critic_of_another_size_is_refused(toy, tmp_path):
    Critic(64).save_pretrained(tmp_path / "critic")
    with pytest.raises(ValueError, match=r"hidden size 64, the trunk it should read has 32: they must be equal"):
        trainer(toy, config(tmp_path, critic="shared"), value_model=str(tmp_path / "critic"))


def test_a_trunk_with_another_vocabulary_is_refused(toy, tmp_path):
    other = EnumerableLM(vocab_size=5, max_completion_length=3)
    with pytest.raises(ValueError, match="share the policy's vocabulary of 4 tokens, got 5 from"):
        trainer(toy, config(tmp_path, critic="separate"), value_model=other.model)
    with pytest.raises(ValueError, match="set `critic='shared'`"):
        trainer(
            toy,
            config(tmp_path, critic="separate"),
            reward_funcs=reward_model(toy, vocab_size=7),
            reward_processing_classes=toy.tokenizer,
        )


def test_the_trunk_of_a_reward_model_that_reads_other_tokens_is_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has another vocabulary"):
        trainer(
            toy,
            config(tmp_path, critic="separate"),
            reward_funcs=reward_model(toy),
            reward_processing_classes=letter_tokenizer(),  # of the same size
        )


def test_other_adapters_than_lora_cannot_be_separate(toy, tmp_path):
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`critic='separate'` on a PEFT policy needs LoRA, got IA3"):
        trainer(toy, config(tmp_path, critic="separate"), peft_config=ia3)
    trainer(toy, config(tmp_path, critic="shared"), peft_config=ia3).train()


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_trunk_of_an_adapter_folder_is_that_under_the_adapter(toy, tmp_path, task_type):
    base = toy.save(tmp_path / "base")
    auto = AutoModelForCausalLM if task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    config_of = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task_type, use_dora=True)
    model = get_peft_model(auto.from_pretrained(base), config_of)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.save_pretrained(tmp_path / "adapter")
    made = trainer(toy, config(tmp_path / "out", critic="separate"), value_model=str(tmp_path / "adapter"))
    ids = torch.tensor([[0, 1, 2, 0]])
    with torch.no_grad():
        expected = model.eval().get_base_model().base_model(ids).last_hidden_state
        assert_close(made.critic.backbone.eval()(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_lacks_weights_of_the_trunk_is_refused(toy, tmp_path):
    file = Path(toy.save(tmp_path / "value")) / "model.safetensors"
    stored = {name: weight for name, weight in load_file(file).items() if "layers.0.mlp.up" not in name}
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*layers\.0\.mlp\.up_proj\.weight"):
        trainer(toy, config(tmp_path / "out", critic="separate"), value_model=str(tmp_path / "value"))

"""What rollouts are drawn from: the raw model, within its context, without the critic."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from rlhf_bayes.testing import EnumerableLM
from rlhf_bayes.trainers._trl.engines import without_critic

from ..training import Recorder, config, gdc_config, largest_change, logged, prompts_of, trainer, weights

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_a_prompt_that_leaves_no_room_is_refused(toy, tmp_path):
    dataset = prompts_of(toy).map(lambda row, index: {"prompt": "a " * (30 if index == 1 else 2)}, with_indices=True)
    with pytest.raises(ValueError, match=r"context of 32 tokens: prompt \d+ has 30 tokens"):
        trainer(toy, config(tmp_path), train_dataset=dataset).train()


def test_a_tokenizer_without_eos_is_refused(toy, tmp_path):
    for special in ({"pad_token": "<pad>"}, {}):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=toy.tokenizer._tokenizer, **special)
        with pytest.raises(ValueError, match=r"`processing_class` must have an EOS token, got .* with"):
            trainer(toy, config(tmp_path), processing_class=tokenizer)


def test_a_tokenizer_without_pad_pads_with_eos_and_eos_still_counts(tmp_path):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3, pad_is_eos=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=toy.tokenizer._tokenizer, eos_token="<eos>", padding_side="left"
    )
    assert tokenizer.pad_token is None
    drawn = []

    def reward(prompts, completion_ids, **kwargs):
        drawn.extend(zip(prompts, completion_ids, strict=True))
        return [0.0] * len(prompts)

    args = config(tmp_path, missing_eos_penalty=1.0)
    trained = trainer(toy, args, None, reward, processing_class=tokenizer)
    trained.train()
    rollout = trained.rollouts[0]
    assert rollout.rewards.tolist() == [-float(ids[-1] != tokenizer.eos_token_id) for _, ids in drawn]
    assert 0 < -rollout.rewards.sum() < len(drawn)
    assert rollout.completion_mask.sum(-1).tolist() == [len(ids) for _, ids in drawn]
    expected = [toy.log_prior[toy.prompts.index(p), toy.completion_ids.index(ids)] for p, ids in drawn]
    assert_close(rollout.token_log_probs.sum(-1), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_models_own_generation_config_does_not_change_the_rollouts(toy, tmp_path):
    masks = []
    for changes in ({}, {"top_k": 1, "repetition_penalty": 2.0, "do_sample": True, "min_new_tokens": 3}):
        model = toy.random_policy(noise=0.0)
        for name, value in changes.items():
            setattr(model.generation_config, name, value)
        trained = trainer(toy, config(tmp_path), model)
        trained.train()
        masks.append(trained.rollouts[0])
        for name, value in changes.items():
            assert getattr(model.generation_config, name) == value  # and it is the user's again
    assert torch.equal(masks[0].completion_mask, masks[1].completion_mask)
    assert torch.equal(masks[0].token_log_probs, masks[1].token_log_probs)


def test_draws_have_the_frequencies_of_the_prior(toy, tmp_path):
    drawn = []

    def reward(prompts, completion_ids, **kwargs):
        drawn.extend(zip(prompts, map(tuple, completion_ids), strict=True))
        return [0.0] * len(prompts)

    sizes = {"per_device_train_batch_size": 3000, "num_generations": 1000}
    trainer(toy, config(tmp_path, **sizes), None, reward).train()
    for row, prompt in enumerate(toy.prompts):
        for column in toy.log_prior[row].argsort(descending=True)[:6]:
            p = toy.log_prior[row, column].exp().item()
            count = drawn.count((prompt, tuple(toy.completion_ids[column])))
            se = (p * (1 - p) / 1000) ** 0.5
            assert abs(count / 1000 - p) < 4.5 * se, (prompt, column, count, p)


class _Server:
    """Stands in for TRL's vLLM client: completions by the prompts' own length, and the names that were sent."""

    def __init__(self, trained):
        self.trained, self.sent = trained, []

    def sync_weights(self):
        self.sent.append([name for name, _ in self.trained.model.named_parameters()])


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critic_never_reaches_vllm(toy, tmp_path, critic):
    trained = trainer(toy, config(tmp_path, critic=critic))
    server = _Server(trained)
    trained.vllm_generation = server
    sends = trained.vllm_generation
    sends.sync_weights = without_critic(sends.sync_weights, trained.model)
    trained.vllm_generation.sync_weights()
    (sent,) = server.sent
    assert set(sent) == {name for name, _ in toy.model.named_parameters()}
    assert any("critic" in name for name, _ in trained.model.named_parameters())


def test_a_critic_adapter_is_sent_as_lora_only(toy, tmp_path):
    trained = trainer(toy, config(tmp_path, critic="separate"), peft_config=LORA)
    server = _Server(trained)
    trained.vllm_generation = server
    sends = trained.vllm_generation
    sends.sync_weights = without_critic(sends.sync_weights, trained.model)
    trained.vllm_generation.sync_weights()
    # TRL drops the names of adapters, which it merges before
    assert not [name for name in server.sent[0] if "critic" in name and "lora_" not in name]


@pytest.mark.parametrize(
    ("critic", "peft", "with_scheduler"),
    [
        ("shared", False, False),
        ("separate", False, False),
        ("shared", True, False),
        ("separate", True, False),
        ("shared", False, True),
        ("separate", True, True),
    ],
)
def test_a_users_optimizer_trains_the_critic_too(toy, tmp_path, critic, peft, with_scheduler):
    model = toy.random_policy(noise=0.0)
    model = get_peft_model(model, LORA) if peft else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if with_scheduler else None
    args = config(tmp_path, max_steps=3, critic=critic)
    trained = trainer(toy, args, model, optimizers=(optimizer, scheduler))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    learns = {name: p for name, p in trained.model.named_parameters() if p.requires_grad}
    assert any("critic" in name for name in learns)
    assert {name for name, parameter in learns.items() if id(parameter) not in held} == set()
    before = weights(trained.model)
    trained.train()
    assert largest_change(before, weights(trained.model), critic=True) > 0
    assert largest_change(before, weights(trained.model), critic=False) > 0


@pytest.mark.parametrize(
    ("critic", "peft"), [("shared", False), ("separate", False), ("shared", True), ("separate", True)]
)
def test_gradient_checkpointing_changes_no_gradient(toy, tmp_path, critic, peft):
    steps = []
    for checkpointing in (False, True):
        recorder = Recorder()
        torch.manual_seed(0)  # older releases of TRL do not seed before they make an adapter
        changes = {"critic": critic, "gradient_checkpointing": checkpointing, "max_steps": 3, "vf_coef": 1.0}
        trained = trainer(
            toy,
            config(tmp_path, **changes, num_iterations=3),
            callbacks=[recorder],
            peft_config=LORA if peft else None,
        )
        # a critic that has learnt something, or its trunk would have no gradient
        torch.nn.init.constant_(trained.critic.value_head.weight, 0.1)
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.02 if "critic" in name else 0.01)
        trained.train()
        assert getattr(trained.model, "is_gradient_checkpointing", False) == checkpointing
        steps.append(recorder.gradients)
    for on, off in zip(*steps, strict=True):
        assert on.keys() == off.keys()
        assert_close(on, off, rtol=1e-4, atol=1e-6)
    last = steps[0][-1]
    if critic == "separate":
        trunk = [name for name in last if (".critic." in name if peft else ".backbone." in name)]
        assert max(last[name].abs().max() for name in trunk) > 1e-4


def test_the_length_of_the_policys_context_is_that_of_prompt_and_completion(toy, tmp_path):
    dataset = prompts_of(toy).map(lambda row: {"prompt": ("a " * 29).strip()})  # 29 + 3 = 32
    trained = trainer(toy, config(tmp_path), train_dataset=dataset)
    trained.train()
    assert logged(trained, "completions/max_length") == [3.0]


@pytest.mark.parametrize("kind", ["ppo", "gdc"])
@pytest.mark.parametrize("peft", [False, True])
def test_dropout_that_is_no_module_is_off(toy, tmp_path, kind, peft):
    """Attention modules hold it as a number, which TRL does not see: log-probs are those of the model, always."""
    policy = toy.random_policy(noise=0.0)
    rates = [module for module in policy.modules() if hasattr(module, "attention_dropout")]
    assert rates
    for module in rates:
        module.attention_dropout = 0.5
    settings = {"max_steps": 2, "num_iterations": 2, "learning_rate": 0.0}
    args = config(tmp_path, **settings) if kind == "ppo" else gdc_config(tmp_path, **settings)
    trained = trainer(toy, args, policy, peft_config=LORA if peft else None)
    trained.train()
    known = toy.log_prior.flatten()
    for name in ("token_log_probs", "ref_token_log_probs"):
        drawn = getattr(trained.rollouts[0], name).sum(-1)
        assert (drawn[:, None] - known).abs().min(-1).values.max() < 1e-4
    again = logged(trained, "gdc/ratio_ess" if kind == "gdc" else "ppo/approx_kl")
    assert again == pytest.approx([float(kind == "gdc")] * 2, abs=1e-4)

"""The critic by itself: zero at first, saved, loaded, and taken out of the policy for a while."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from rlhf_bayes.lm import Critic
from rlhf_bayes.lm.critic import (
    CRITIC,
    active_adapter,
    critic_config,
    detached_critic,
    is_critic_folder,
    kept_trainable,
    set_trainable,
    split_critic,
)
from rlhf_bayes.lm.forward import base_causal_lm

from .families import tiny_model

PLACES = torch.tensor([1, 2, 6])  # in rows of 2 + 3 tokens: before tokens 0 and 1 of the first, 0 of the second
INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])}


def lora_model(names=("default",)):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return model


def head_with_weights(critic):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        critic.value_head.weight.normal_(generator=generator)
        critic.value_head.bias.fill_(0.5)
    return critic


def test_it_starts_at_zero_in_full_precision():
    hidden = torch.randn(3, 16).bfloat16()
    values = Critic(16).bfloat16()(None, hidden, PLACES, INPUTS)
    assert values.dtype == torch.float32
    assert values.tolist() == [0.0, 0.0, 0.0]


def test_shared_reads_the_states_it_is_given_and_may_stop_the_gradient():
    critic = head_with_weights(Critic(16))
    hidden = torch.randn(3, 16, requires_grad=True)
    values = critic(None, hidden, PLACES, INPUTS)
    assert_close(values, hidden @ critic.value_head.weight[0] + 0.5)
    critic.detach_trunk = True
    critic(None, hidden, PLACES, INPUTS).sum().backward()
    assert hidden.grad is None
    assert critic.value_head.weight.grad is not None


def test_a_backbone_reads_the_prefix_of_each_token():
    backbone = tiny_model("llama", seed=3).base_model
    critic = head_with_weights(Critic(16, backbone=backbone))
    values = critic(None, torch.zeros(3, 16), PLACES, INPUTS)
    # rows of 2 + 3 tokens: the values before tokens 0 and 1 of the first, token 0 of the second
    for value, (row, length) in zip(values, [(0, 2), (0, 3), (1, 2)], strict=True):
        state = backbone(INPUTS["input_ids"][row : row + 1, :length]).last_hidden_state[0, -1]
        assert_close(value, critic.value_head(state)[0], rtol=1e-4, atol=1e-5)


def test_an_adapter_is_active_for_the_critic_only():
    model = lora_model(("default", CRITIC))
    lm = base_causal_lm(model)
    critic = head_with_weights(Critic(16, adapter=CRITIC))
    with torch.no_grad():
        before = model(**INPUTS).logits
        values = critic(lm, torch.zeros(3, 16), PLACES, INPUTS)
        assert_close(model(**INPUTS).logits, before)
        with model.disable_adapter():
            assert_close(critic(lm, torch.zeros(3, 16), PLACES, INPUTS), values)
        model.set_adapter(CRITIC)
        states = lm.base_model(**INPUTS).last_hidden_state.flatten(0, 1)[PLACES]
        assert_close(values, critic.value_head(states).squeeze(-1))
        model.set_adapter("default")
        states = lm.base_model(**INPUTS).last_hidden_state.flatten(0, 1)[PLACES]
        assert (values - critic.value_head(states).squeeze(-1)).abs().max() > 1e-3


def test_an_active_adapter_comes_back_after_an_error():
    model = lora_model(("default", "ref"))
    before = model(**INPUTS).logits
    with active_adapter(base_causal_lm(model), "ref"):
        assert (model(**INPUTS).logits - before).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="stop"), active_adapter(base_causal_lm(model), "ref"):
        raise RuntimeError("stop")
    assert_close(model(**INPUTS).logits, before)


@pytest.mark.parametrize("kind", ["shared", "backbone", "adapter"])
def test_saving_and_loading(kind, tmp_path):
    backbone = tiny_model("qwen2", seed=3).base_model if kind == "backbone" else None
    critic = head_with_weights(Critic(16, backbone, CRITIC if kind == "adapter" else None))
    critic.save_pretrained(tmp_path / "critic")
    assert is_critic_folder(tmp_path / "critic")
    assert critic_config(tmp_path / "critic")["trunk"] == kind
    loaded = Critic.from_pretrained(tmp_path / "critic")
    assert loaded.adapter == critic.adapter
    assert loaded.state_dict().keys() == critic.state_dict().keys()
    for name, tensor in critic.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    if kind == "backbone":
        fresh = Critic(16, tiny_model("qwen2", seed=4).base_model)
        fresh.load(tmp_path / "critic")
        assert_close(fresh(None, torch.zeros(3, 16), PLACES, INPUTS), critic(None, torch.zeros(3, 16), PLACES, INPUTS))


def test_a_gathered_state_dict_is_saved_in_place_of_the_weights(tmp_path):
    critic = Critic(16, tiny_model("llama").base_model)
    state = {name: torch.ones_like(tensor) for name, tensor in critic.state_dict().items()}
    critic.save_pretrained(tmp_path, state)
    assert all((tensor == 1).all() for tensor in Critic.from_pretrained(tmp_path).state_dict().values())


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder with a saved critic, but holds no critic_config\.json"):
        Critic.from_pretrained(tmp_path)
    assert not is_critic_folder(tmp_path)
    Critic(8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has hidden size 8, the trunk it should read has 16: they must be equal"):
        Critic(16).load(tmp_path)


@pytest.mark.parametrize("kind", ["shared", "backbone"])
def test_the_critic_is_out_for_a_while_and_its_weights_can_be_told_apart(kind):
    lm = tiny_model("llama")
    plain = set(lm.state_dict())
    critic = Critic(16, tiny_model("llama", seed=1).base_model if kind == "backbone" else None)
    lm.add_module(CRITIC, critic)
    with detached_critic(lm) as out:
        assert out is critic
        assert set(lm.state_dict()) == plain
    assert lm.critic is critic
    with pytest.raises(RuntimeError), detached_critic(lm):
        raise RuntimeError
    assert lm.critic is critic
    policy, own = split_critic(lm.state_dict())
    assert set(policy) == plain
    assert set(own) == set(critic.state_dict())
    with detached_critic(tiny_model("llama")) as nothing:
        assert nothing is None


def test_split_knows_the_critic_under_wrappers_and_leaves_its_adapter_to_peft():
    one = torch.zeros(1)
    names = {
        "base_model.model.critic.value_head.weight": "value_head.weight",
        "module.critic.backbone.layers.0.weight": "backbone.layers.0.weight",
    }
    adapter = "base_model.model.model.layers.0.q_proj.lora_A.critic.weight"
    policy, own = split_critic(dict.fromkeys([*names, adapter], one))
    assert set(own) == set(names.values())
    assert set(policy) == {adapter}


def test_only_the_critics_parts_become_trainable():
    model = lora_model(("default", CRITIC)).requires_grad_(False)
    set_trainable(base_causal_lm(model), critic := Critic(16, adapter=CRITIC).requires_grad_(False))
    assert all(parameter.requires_grad for parameter in critic.parameters())
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if ".critic." in name}


def test_what_was_trainable_stays_so_when_adapters_are_switched():
    model = lora_model(("default", CRITIC))
    set_trainable(base_causal_lm(model), Critic(16, adapter=CRITIC))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with kept_trainable(model), model.disable_adapter():
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with model.disable_adapter():  # PEFT itself forgets it
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} != before

"""Policy, prior and critic read the images of a prompt wherever they score its completions."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification
from trl.data_utils import prepare_multimodal_messages

from rlhf_bayes import GDCConfig, LanguageModel, PosteriorCallback, PPOConfig
from rlhf_bayes.lm.head import excluded_tokens
from rlhf_bayes.trainers.rollout.images import images_of, with_images_in_chat
from rlhf_bayes.trainers.rollout.scored_rollout import prompt_key

from ..image_models import (
    FAMILIES,
    dataset_of_images,
    picture,
    plain_distributions,
    plain_log_probs,
    processor_and_model,
    rows_of_several_images,
)
from ..training import QUIET, RecordingGDC, RecordingPPO, largest_change, weights

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def many_words(prompts, completions, **columns):
    return [float(len(set(completion[0]["content"].split()))) for completion in completions]


def image_trainer(folder, family: str, of: type = PPOConfig, reward=many_words, **arguments: Any) -> Any:
    args = of(
        output_dir=str(folder),
        **QUIET
        | {
            "max_completion_length": 4,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "steps_per_generation": 2,
            "max_steps": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "beta": 0.5,
            "logging_steps": 1,
            **arguments.pop("changes", {}),
        },
    )
    processor, model = processor_and_model(family)
    defaults = {"model": model, "train_dataset": dataset_of_images(), "processing_class": processor}
    kind = RecordingPPO if of is PPOConfig else RecordingGDC
    return kind(reward_funcs=reward, args=args, **defaults | arguments)


def scored_rows(trained) -> tuple[list[dict], Any]:
    """Rows with 1, 1, 3 and no images, two completions each, and the rollout that the trainer makes of them now."""
    rows = [row for row in rows_of_several_images() for _ in range(2)]
    trained.model.train()
    trained._generate_and_score_completions(rows)
    return rows, trained.rollouts[-1]


def assert_scores(columns: torch.Tensor, model, processor, rows, rollout) -> None:
    for row, scores, ids, mask in zip(
        rows, columns, rollout.completion_ids, rollout.completion_mask.bool(), strict=True
    ):
        assert_close(scores[mask], plain_log_probs(model, processor, row, ids[mask]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_is_scored_with_its_images_under_policy_and_prior(family, tmp_path):
    trained = image_trainer(tmp_path, family)
    trained.train()
    rows, rollout = scored_rows(trained)
    processor, prior = processor_and_model(family)
    _, policy = processor_and_model(family)
    policy.load_state_dict({n: w for n, w in trained.model.state_dict().items() if not n.startswith("critic.")})
    assert_scores(rollout.token_log_probs, policy, processor, rows, rollout)
    assert_scores(rollout.ref_token_log_probs, prior, processor, rows, rollout)
    assert (rollout.token_log_probs - rollout.ref_token_log_probs).abs().max() > 1e-2
    others = [{**row, "images": [picture(9)] * len(row["images"])} for row in rows]
    with pytest.raises(AssertionError):  # the images matter
        assert_scores(rollout.token_log_probs, policy, processor, others, rollout)
    assert not (rollout.completion_ids == prior.config.image_token_id).any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_with_peft_the_base_is_the_prior_and_at_first_the_policy(family, tmp_path):
    trained = image_trainer(tmp_path, family, GDCConfig, peft_config=LORA, changes={"pad_to_multiple_of": 8})
    rows, rollout = scored_rows(trained)
    assert_close(rollout.token_log_probs, rollout.ref_token_log_probs, atol=1e-6, rtol=0)
    assert_close(rollout.token_kl, torch.zeros_like(rollout.token_kl), atol=1e-6, rtol=0)
    trained.train()
    trained.save_model()
    rows, rollout = scored_rows(trained)
    processor, prior = processor_and_model(family)
    assert_scores(rollout.ref_token_log_probs, prior, processor, rows, rollout)
    policy = PeftModel.from_pretrained(prior, tmp_path).eval()
    assert_scores(rollout.token_log_probs, policy, processor, rows, rollout)
    assert (rollout.token_log_probs - rollout.ref_token_log_probs).abs().max() > 1e-3


def test_the_exact_kl_is_that_of_the_distributions_without_the_image_token(tmp_path):
    trained = image_trainer(tmp_path, "llava")
    trained.train()
    rows, rollout = scored_rows(trained)
    processor, prior = processor_and_model("llava")
    _, policy = processor_and_model("llava")
    policy.load_state_dict({n: w for n, w in trained.model.state_dict().items() if not n.startswith("critic.")})
    columns = rollout.completion_ids, rollout.completion_mask.bool(), rollout.token_kl, rollout.token_entropy
    for row, ids, mask, kls, entropies in zip(rows, *columns, strict=True):
        log_p, log_q = (plain_distributions(model, processor, row, ids[mask]) for model in (policy, prior))
        p = log_p.exp()  # (T, V)
        assert_close(kls[mask], torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1), atol=1e-4, rtol=1e-3)
        assert_close(entropies[mask], -torch.where(p > 0, p * log_p, 0.0).sum(-1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_separate_critic_reads_the_images(peft_config, tmp_path):
    trained = image_trainer(tmp_path, "llava", peft_config=peft_config, changes={"critic": "separate"})
    with torch.no_grad():
        trained.critic.value_head.weight.fill_(1.0)
    _, rollout = scored_rows(trained)
    assert rollout.values[0, 0] == pytest.approx(rollout.values[1, 0].item(), abs=1e-5)  # one prompt
    assert (rollout.values[0, 0] - rollout.values[2, 0]).abs() > 1e-3  # another image, the same words
    before = weights(trained.model)
    trained.train()
    assert largest_change(before, weights(trained.model), critic=True) > 0


def test_a_critic_that_reads_no_images_is_refused(tmp_path):
    processor, _ = processor_and_model("llava")
    size = len(processor.tokenizer)
    reward = BertForSequenceClassification(
        BertConfig(
            vocab_size=size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
            num_labels=1,
            pad_token_id=0,
        )
    )
    arguments = {"reward": reward, "reward_processing_classes": processor.tokenizer}
    with pytest.raises(
        ValueError, match="The critic's trunk must read images as the policy's does, a LlavaModel, got"
    ):
        image_trainer(tmp_path, "llava", **arguments, changes={"critic": "separate"})
    with pytest.raises(ValueError, match="reads no images, got a message with parts of the types"):
        image_trainer(tmp_path, "llava", **arguments).train()


def test_replayed_rows_keep_their_images(tmp_path):
    changes = {"replay_batches": 3, "max_steps": 3, "learning_rate": 1e-9, "proposal": "adaptive"}
    trained = image_trainer(tmp_path, "qwen2_5_vl", GDCConfig, changes=changes)
    trained.train()
    assert len(trained.objective.replay.rollouts) == 2
    for batch in trained.objective.replay.sample([4, 4]):
        # at this learning rate the policy has hardly moved
        log_probs = trained.score(trained.model, batch).log_probs.sum(-1)
        assert_close(log_probs, batch.log_policy, atol=1e-3, rtol=1e-3)


def test_a_resumed_run_goes_on_with_the_same_images(tmp_path):
    changes = {"max_steps": 4, "steps_per_generation": 4, "per_device_train_batch_size": 2, "save_steps": 1}
    changes |= {"save_strategy": "steps"}
    whole = image_trainer(tmp_path / "whole", "llava", changes=changes)
    whole.train()
    resumed = image_trainer(tmp_path / "resumed", "llava", changes=changes)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    assert largest_change(weights(whole.model), weights(resumed.model)) == 0
    assert largest_change(weights(processor_and_model("llava")[1]), weights(whole.model)) > 0


def test_equal_words_with_other_images_are_other_prompts(tmp_path):
    rows = rows_of_several_images()
    keys = [prompt_key(row) for row in rows]
    assert len(set(keys)) == 4
    again = [prompt_key({**row, "images": [copy.deepcopy(image) for image in row["images"]]}) for row in rows]
    assert keys == again
    trained = image_trainer(tmp_path, "llava", GDCConfig, changes={"prior_samples": 4})
    trained.train()
    assert len(trained.objective.target.normalizers.pool.state_dict()["entries"]) == 4


@pytest.mark.parametrize("make", [lambda x: x, torch.from_numpy], ids=["array", "tensor"])
def test_the_middle_of_an_array_counts(make):
    array = np.zeros((100, 100))
    changed = array.copy()
    changed[50, 50] = 1
    assert repr(array) == repr(changed)
    assert prompt_key({"x": make(array)}) != prompt_key({"x": make(changed)})
    assert prompt_key({"x": make(array)}) == prompt_key({"x": make(array.copy())})


@pytest.mark.parametrize("column", ["image", "images", "chat"])
def test_images_stand_in_the_chat_wherever_they_came_from(column):
    for row in dataset_of_images(column).select([0, 1]):
        found = with_images_in_chat(row, prepare_multimodal_messages)
        assert found.keys() == {"prompt"}
        (message,) = found["prompt"]
        assert [part["type"] for part in message["content"]] == ["image", "text"]
    (image,) = images_of(found["prompt"])
    assert np.array_equal(np.array(image), np.array(picture(1)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "what", "image": picture(0)}, r"`prompt` must be a list of messages .* got the text 'what'"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
            "`prompt` must hold parts of `type` 'text', or 'image' with the image itself",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"got \{'type': 'image', 'url': 'x'\}\. Load the image",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        with_images_in_chat(row, prepare_multimodal_messages)


def test_a_tokenizer_does_not_read_images(tmp_path):
    processor, _ = processor_and_model("llava")
    match = "`processing_class` must be the model's processor where prompts have images, got "
    with pytest.raises(ValueError, match=match + r".*`train_dataset` with the columns \['prompt', 'images'\]"):
        image_trainer(tmp_path, "llava", processing_class=processor.tokenizer)
    chats = dataset_of_images("chat")
    trained = image_trainer(tmp_path, "llava", processing_class=processor.tokenizer, train_dataset=chats)
    with pytest.raises(ValueError, match=match + r".*a prompt with images"):
        trained.train()


def test_a_later_trainer_of_text_draws_every_token_again(tmp_path):
    processor, model = processor_and_model("llava")
    image_trainer(tmp_path, "llava", model=model)
    texts = Dataset.from_dict({"prompt": ["what color", "is red is blue"] * 4})
    arguments = {"model": model, "processing_class": processor.tokenizer, "train_dataset": texts}
    trained = image_trainer(tmp_path, "llava", **arguments)
    assert excluded_tokens(trained.model) == excluded_tokens(trained.ref_model) == ()
    assert trained.generation_config.suppress_tokens is None


def test_text_is_read_by_a_processor_too(tmp_path):
    texts = Dataset.from_dict({"prompt": ["what color", "is red is blue", "cat", "what is cat"]})
    trained = image_trainer(tmp_path, "gemma3", train_dataset=texts, reward=lambda completions, **_: [1.0] * 8)
    trained.train()
    assert trained.state.global_step == 2


def test_evaluation_of_images_is_refused_before_training(tmp_path):
    trained = image_trainer(tmp_path, "llava")
    processor, model = processor_and_model("llava")
    with pytest.raises(ValueError, match="`tokenizer` must be a tokenizer, got LlavaProcessor"):
        LanguageModel(model, processor)
    prior = LanguageModel(model, processor.tokenizer, max_completion_length=4)
    with pytest.raises(ValueError, match=r"must be texts or chats of texts for a `LanguageModel`.*'image'"):
        prior.sample([dataset_of_images("chat")[0]["prompt"]])
    with pytest.raises(ValueError, match="`trainer` must train on text, got a processor of images, LlavaProcessor"):
        PosteriorCallback(prior.tilt(many_words, 0.5), trained)
    with pytest.raises(ValueError, match="`model_or_path` must draw every token, got a LlavaForConditionalGeneration"):
        LanguageModel(trained.model, processor.tokenizer)


def test_a_prior_that_only_its_vision_tower_shows_to_move_is_copied(tmp_path):
    # biases are trained in place: the policy without its adapter is not the prior, which text alone does not show
    lora = LoraConfig(r=2, target_modules=r".*vision_tower.*v_proj", bias="lora_only", task_type="CAUSAL_LM")
    trained = image_trainer(tmp_path, "llava", peft_config=lora)
    assert trained.reference.module is not None
    trained.train()
    rows, rollout = scored_rows(trained)
    processor, prior = processor_and_model("llava")
    assert_scores(rollout.ref_token_log_probs, prior, processor, rows, rollout)


def test_a_model_that_is_scored_without_its_images_is_refused(tmp_path, monkeypatch):
    trained = image_trainer(tmp_path, "llava")
    monkeypatch.setattr("rlhf_bayes.lm.forward.collated", lambda *of_rows: {})
    with pytest.raises(ValueError, match="scores in a padded batch differ from plain passes of single rows"):
        trained.train()
    assert trained.state.global_step == 0


@pytest.mark.parametrize("broken", ["model", "ref_model"])
def test_a_model_that_draws_without_its_images_is_refused(broken, tmp_path, monkeypatch):
    trained = image_trainer(tmp_path, "llava")
    model = getattr(trained, broken)
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def without_images(*ids, **inputs):
        return prepare(*ids, **inputs | dict.fromkeys(("pixel_values", "mm_encoder_outputs")))

    monkeypatch.setattr(model, "prepare_inputs_for_generation", without_images)
    with pytest.raises(ValueError, match="draws with a cache differ from plain passes of single rows"):
        trained.train()
    assert trained.state.global_step == 0

"""
One row of `gpu_speed.py`: trains a random model of Qwen2's kind for a few rollouts and prints its speed, as JSON.

EOS and padding are outside the model's vocabulary, so every completion has the same length (see `speed_worker.py`).
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from device_limits import Limits, peak_memory, wait_for
from peft import LoraConfig
from speed_worker import (
    NUM_GENERATIONS,
    WARM_UP,
    Clock,
    OptimizerTimer,
    Shape,
    build_prompts,
    build_tokenizer,
    mark_phases,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config
from trl import RLOOConfig, RLOOTrainer

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer
from rlhf_bayes.commands.footprint import Roles, Run, footprint
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.lm import enable_completion_scoring, score_completions
from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.head import LMHead, token_log_probs_and_entropy
from rlhf_bayes.lm.trunk import trunk_of

LORA_RANK, BETA, LEARNING_RATE = 16, 0.05, 1e-5
CLASSES = {"rloo": (RLOOConfig, RLOOTrainer), "ppo": (PPOConfig, PPOTrainer), "gdc": (GDCConfig, GDCTrainer)}
# Adam reads weight, gradient and two moments of each trained weight, and writes all but the gradient, in fp32
OPTIMIZER_BYTES = 7 * 4


QWEN2_HALF_B = Shape(
    layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, tied=True, vocabulary=151936,
    prompt=256, completion=256, batch=16,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The method to measure, and its settings."""

    method: str  # rloo, ppo, gdc, or noise
    lora: bool = False
    vllm: bool = False
    bits: int | None = None  # of QLoRA
    attention: str = "sdpa"
    checkpointing: bool = False
    autocast: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Weights that learn are fp32, as TRL loads them, and run in bf16 by autocast; others are bf16."""
        return torch.bfloat16 if self.lora else torch.float32


@dataclass
class DeviceClock(Clock):
    """Waits for the device before it looks at the time, so that a phase has what it started."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def now(self) -> tuple[float, float]:
        wait_for(self.device)
        return time.perf_counter(), time.process_time()


def config_of(size: Shape) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.prompt + size.completion,
        tie_word_embeddings=size.tied,
        eos_token_id=size.vocabulary,
    )


def save_model(size: Shape, folder: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(size), dtype=torch.float32).save_pretrained(folder)
    build_tokenizer(size).save_pretrained(folder)  # which vLLM reads


def reward(prompts, completions, completion_ids, **columns) -> list[float]:
    """It costs nothing: trainers are measured, not rewards."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainer_of(row: Row, size: Shape, device: torch.device, base: str, output: str, steps: int) -> Any:
    """The trainer of a row, whose model is read from a folder."""
    config_class, trainer_class = CLASSES[row.method]
    engine: dict[str, Any] = {}
    if row.vllm:
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": size.prompt + size.completion}
    loading: dict[str, Any] = {"dtype": row.dtype, "attn_implementation": row.attention}
    if row.bits is not None:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=row.bits == 4, load_in_8bit=row.bits == 8, bnb_4bit_compute_dtype=torch.bfloat16
        )
        loading["device_map"] = {"": "cpu" if device.type == "cpu" else 0}
    args = config_class(
        output_dir=output,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=size.batch,
        num_generations=NUM_GENERATIONS,
        max_completion_length=size.completion,
        max_steps=steps,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=row.autocast,
        gradient_checkpointing=row.checkpointing,
        model_init_kwargs=loading,
        **engine,
    )
    lora = LoraConfig(r=LORA_RANK, lora_alpha=32, task_type="CAUSAL_LM", target_modules="all-linear")
    return trainer_class(
        model=base,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": build_prompts(size)}),
        processing_class=build_tokenizer(size),
        peft_config=lora if row.lora else None,
    )


def forward_flops(size: Shape, trunk: int, tokens: int, scored: int) -> float:
    """
    Operations of a forward pass of one sequence.

    Args:
        size ([`Shape`]): The sizes of the model.
        trunk (`int`): Weights under the head that are in a matrix product.
        tokens, scored (`int`): Tokens of the sequence, and those of which logits are made.
    """
    head = size.vocabulary * size.hidden
    attention = 2 * size.layers * size.hidden * tokens**2  # products with keys and values, half of them masked
    return 2 * (trunk * tokens + head * scored) + attention


def shortest(row: Row, size: Shape, limits: Limits, model: nn.Module) -> dict[str, float]:
    """
    Seconds that a rollout takes at least: generation, and the rest of its step.

    Each step of decoding reads the weights and the cache once. The rest is a forward of the policy and of the prior,
    and a backward pass, which takes twice a forward, or once where the weights get no gradient; and Adam's step.
    """
    base = base_causal_lm(model)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    read = {p for name, p in base.named_parameters() if tied or "embed_tokens" not in name}
    weights = sum(p.numel() * p.element_size() for p in read)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config_of(size))
    trunk = sum(p.numel() for p in trunk_of(plain).parameters()) - size.vocabulary * size.hidden
    prefill = size.batch * forward_flops(size, trunk, size.prompt, 1) / limits.flops
    kept = 2 * 2 * size.layers * size.kv_heads * size.hidden // size.heads  # bytes of a token in the cache, in bf16
    decoding = 0.0
    for length in range(size.prompt + 1, size.prompt + size.completion):
        flops = 2 * (trunk + size.vocabulary * size.hidden) + 4 * size.layers * size.hidden * length
        decoding += max((weights + size.batch * length * kept) / limits.bandwidth, size.batch * flops / limits.flops)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    passes = 2 + (1 if row.lora else 2)
    forward = size.batch * forward_flops(size, trunk, size.prompt + size.completion, size.completion)
    step = passes * forward / limits.flops + trained * OPTIMIZER_BYTES / limits.bandwidth
    return {"generation": prefill + decoding, "training": step}


def predicted(row: Row, size: Shape) -> float | None:
    """The peak that `rlhf-bayes memory` predicts, bytes; None for what it does not know."""
    if row.method == "rloo" or row.bits is not None or row.vllm:
        return None
    roles = Roles(LORA_RANK if row.lora else None, "all-linear", "ridge", "function")
    lengths = (size.batch, size.prompt, size.completion)
    run = Run(*lengths, dtype=row.dtype, gradient_checkpointing=row.checkpointing)
    return footprint(config_of(size), roles, run).peak


def peak_of(row: Row, size: Shape, device: torch.device, base: str, output: str) -> int:
    """Bytes at the peak of two steps; the first creates the optimizer's state."""
    with peak_memory(device) as peak:
        trainer_of(row, size, device, base, output, steps=2).train()
    return peak.bytes


def work(row: Row, size: Shape, device: torch.device, rollouts: int) -> dict[str, Any]:
    """Speed and memory of a row, beside the limits of the device, which are measured first."""
    limits = Limits.of(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # vLLM looks at what is free
    clock = DeviceClock(device=device)
    with tempfile.TemporaryDirectory() as folder:
        base, output = f"{folder}/base", f"{folder}/out"
        save_model(size, base)
        trainer = trainer_of(row, size, device, base, output, steps=rollouts + WARM_UP + 1)
        trainer.add_callback(OptimizerTimer(clock))
        mark_phases(trainer, clock)
        trainer.train()
        least = shortest(row, size, limits, trainer.model)
        del trainer
        peak = None if row.vllm else peak_of(row, size, device, base, output)
    spent = {name: value / 1000 * size.batch for name, value in clock.medians(size.batch)["wall"].items()}
    generated, seen = size.batch * size.completion, size.batch * (size.prompt + size.completion)
    training = spent["scoring"] + spent["training"]
    return {
        "generation": generated / spent["generation"],
        "generation_limit": generated / least["generation"],
        "training": seen / training,
        "training_limit": seen / least["training"],
        "seconds": spent["total"],
        "peak": peak,
        "predicted": predicted(row, size),
        "limits": asdict(limits),
    }


@torch.no_grad()
def noise(size: Shape, device: torch.device) -> dict[str, dict[str, float]]:
    """Root mean squares of the errors of log-probs against fp32, nats: of tokens, and of whole completions."""
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.float32).eval()
    # tied weights of the usual size would make every token about as likely
    exact.get_output_embeddings().weight.mul_(2.5 / (exact.config.initializer_range * size.hidden**0.5))
    weights = {name: weight.bfloat16() for name, weight in exact.state_dict().items()}
    coarse = AutoModelForCausalLM.from_config(config_of(size), dtype=torch.bfloat16).eval()
    for model in (exact, coarse):
        model.load_state_dict(weights)
        enable_completion_scoring(model.to(device))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (size.batch, size.prompt + size.completion), generator=generator).to(device)
    prompts, completions = ids.split((size.prompt, size.completion), dim=1)
    masks = [torch.ones_like(x, dtype=torch.bool) for x in (prompts, completions)]
    batch = (prompts, masks[0], completions, masks[1])

    def errors(log_probs: torch.Tensor) -> dict[str, float]:
        difference = log_probs - expected  # (B, T)
        found = {"token": difference, "completion": difference.sum(-1)}
        return {name: value.square().mean().sqrt().item() for name, value in found.items()}

    expected = score_completions(exact, *batch).log_probs
    hidden = score_completions(coarse, *batch, hidden_only=True).hidden.float()
    with_head, _ = token_log_probs_and_entropy(hidden, completions.flatten(), LMHead.of(exact))
    with torch.autocast(device.type, torch.bfloat16):
        autocast = score_completions(exact, *batch).log_probs
    return {
        "weights in bf16": errors(score_completions(coarse, *batch).log_probs),
        "weights in bf16, head in fp32": errors(with_head.view_as(expected)),
        "weights in fp32, autocast": errors(autocast),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--row", type=json.loads, required=True)
    parser.add_argument("--size", type=json.loads, default={})
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--rollouts", type=int, default=8)
    args = parser.parse_args()
    row, size = Row(**args.row), replace(QWEN2_HALF_B, **args.size)
    quiet(threads=torch.get_num_threads())
    found = noise(size, args.device) if row.method == "noise" else work(row, size, args.device, args.rollouts)
    print("FOUND " + json.dumps(found))  # vLLM prints lines of its own, also at the end


if __name__ == "__main__":
    main()

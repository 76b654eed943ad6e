"""
One row of `ppo_speed.py`: trains a small random Llama for a few rollouts and prints the cost of each phase, as JSON.

It runs in the environment of this package and, for the PPO that TRL removed, in one with trl 1.12; so `rlhf_bayes` is
imported only where it is measured. EOS and padding are outside the model's vocabulary, so every completion has the
same length, and all trainers do the same work.
"""

import argparse
import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

PHASES = ("generation", "scoring", "training")
WARM_UP = 2  # rollouts that are not measured, in which libraries choose kernels and memory pools grow
BETA, LEARNING_RATE, NUM_GENERATIONS = 0.05, 1e-4, 4


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of the batch."""

    layers: int = 4
    hidden: int = 128
    vocabulary: int = 512
    prompt: int = 32
    completion: int = 32
    batch: int = 32
    heads: int = 4
    kv_heads: int = 4
    intermediate: int | None = None
    """Width of the MLP; 4 × hidden where it is not given."""
    tied: bool = False
    """Whether the head is the embedding."""


@dataclass(frozen=True)
class Row:
    """The method to measure, and its settings."""

    method: str  # floor, rloo, ppo, gdc, or ppo_1_12
    lora: bool = False
    critic: str = "ridge"
    epochs: int = 1


@dataclass
class Clock:
    """Wall and CPU seconds of each phase in each rollout. A rollout lasts until the next one starts to generate."""

    starts: list[tuple[float, float]] = field(default_factory=list)
    spent: list[dict[str, tuple[float, float]]] = field(default_factory=list)

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def start_rollout(self) -> None:
        self.starts.append(self.now())
        self.spent.append(dict.fromkeys(PHASES, (0.0, 0.0)))

    def add(self, phase: str, since: tuple[float, float], sign: int = 1) -> None:
        spent, now = self.spent[-1], self.now()
        spent[phase] = tuple(old + sign * (b - a) for old, a, b in zip(spent[phase], since, now, strict=True))

    def timed(self, phase: str, function, *, not_in: str | None = None):
        """`function` with its time added to a phase, and subtracted from the phase `not_in` in which it runs."""

        def wrapper(*args, **kwargs):
            since = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(phase, since)
                if not_in is not None:
                    self.add(not_in, since, sign=-1)

        return wrapper

    def medians(self, episodes: int) -> dict[str, dict[str, float]]:
        """Milliseconds per episode: {"wall" | "cpu": {"total" | phase | "rest"}}."""
        rollouts = range(WARM_UP, len(self.starts) - 1)
        result = {}
        for index, clock in enumerate(("wall", "cpu")):
            totals = [self.starts[r + 1][index] - self.starts[r][index] for r in rollouts]
            columns = {phase: [self.spent[r][phase][index] for r in rollouts] for phase in PHASES}
            columns["rest"] = [total - sum(parts) for total, *parts in zip(totals, *columns.values(), strict=True)]
            columns = {"total": totals} | columns
            result[clock] = {name: 1000 / episodes * statistics.median(column) for name, column in columns.items()}
        return result


def build_model(shape: Shape, cls=LlamaForCausalLM):
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or 4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.prompt + shape.completion,
        bos_token_id=0,
        eos_token_id=shape.vocabulary,
        pad_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(0)
    return cls(config)


def build_tokenizer(shape: Shape, words: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with as many words as the vocabulary, or fewer; EOS and padding are outside of it."""
    vocabulary = {f"w{i}": i for i in range(words or shape.vocabulary)} | {
        "<eos>": shape.vocabulary,
        "<pad>": shape.vocabulary + 1,
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="w0", padding_side="left"
    )


def build_prompts(shape: Shape) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, shape.vocabulary, (256, shape.prompt), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def reward(prompts, completions, completion_ids, **columns) -> list[float]:
    """The share of even tokens. It costs nothing, so that trainers are measured rather than a reward model."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def lora_config(row: Row) -> LoraConfig | None:
    return LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM") if row.lora else None


def run_floor(row: Row, shape: Shape, rollouts: int, clock: Clock) -> None:
    """The work that every trainer must do: generate, score under the prior, forward and backward."""
    model = build_model(shape)
    model = get_peft_model(model, lora_config(row)) if row.lora else model
    ref_model = None if row.lora else build_model(shape).eval()
    tokenizer = build_tokenizer(shape)
    config = GenerationConfig(
        max_new_tokens=shape.completion, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None
    )
    prompts = tokenizer(build_prompts(shape)[: shape.batch], return_tensors="pt")["input_ids"]
    ones = torch.ones(shape.batch, shape.prompt + shape.completion, dtype=torch.long)

    def log_probs(lm, ids):
        logits = lm(input_ids=ids, attention_mask=ones, logits_to_keep=shape.completion + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, shape.prompt :, None]).squeeze(-1)

    def generate():
        with torch.no_grad():
            return model.generate(input_ids=prompts, attention_mask=ones[:, : shape.prompt], generation_config=config)

    def score(ids):
        with torch.no_grad():
            if ref_model is not None:
                return log_probs(ref_model, ids)
            with model.disable_adapter():
                return log_probs(model, ids)

    def train(ids):
        for _ in range(row.epochs):
            model.zero_grad()
            log_probs(model, ids).mean().backward()

    generate, score, train = (clock.timed(name, f) for name, f in zip(PHASES, (generate, score, train), strict=True))
    for _ in range(rollouts + WARM_UP):
        clock.start_rollout()
        ids = generate()
        score(ids)
        train(ids)
    clock.start_rollout()


class OptimizerTimer(TrainerCallback):
    """Times the optimizer's step, which runs outside `training_step`."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.since = self.clock.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.clock.add("training", self.since)


def run_hosted(row: Row, shape: Shape, rollouts: int, clock: Clock) -> None:
    """RLOO of the installed TRL, or this package's PPO or GDC on top of it."""
    from trl import RLOOConfig, RLOOTrainer

    from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer

    classes = {
        "rloo": (RLOOConfig, RLOOTrainer),
        "ppo": (PPOConfig, PPOTrainer),
        "gdc": (GDCConfig, GDCTrainer),
    }
    config_class, trainer_class = classes[row.method]
    with tempfile.TemporaryDirectory() as folder:
        # RLOO reloads its reference from the model's path, so the model must be saved
        build_model(shape).save_pretrained(folder)
        trainer = trainer_class(
            model=folder,
            reward_funcs=reward,
            args=config_class(
                output_dir=f"{folder}/out",
                beta=BETA,
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=shape.batch,
                num_generations=NUM_GENERATIONS,
                num_iterations=row.epochs,
                max_completion_length=shape.completion,
                max_steps=(rollouts + WARM_UP + 1) * row.epochs,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                model_init_kwargs={"dtype": "float32"},
                **({"critic": row.critic} if row.method == "ppo" else {}),
            ),
            train_dataset=Dataset.from_dict({"prompt": build_prompts(shape)}),
            processing_class=build_tokenizer(shape),
            peft_config=lora_config(row),
            callbacks=[OptimizerTimer(clock)],
        )
    mark_phases(trainer, clock)
    trainer.train()


def mark_phases(trainer, clock: Clock) -> None:
    """Have the phases of RLOO, or of a trainer on top of it, timed; the optimizer's step by `OptimizerTimer`."""
    rollout = clock.timed("scoring", trainer._generate_and_score_completions)

    def marked(*args):
        clock.start_rollout()
        return rollout(*args)

    trainer._generate_and_score_completions = marked
    trainer._generate = clock.timed("generation", trainer._generate, not_in="scoring")
    trainer.compute_loss = clock.timed("training", trainer.compute_loss)
    trainer.accelerator.backward = clock.timed("training", trainer.accelerator.backward)


class FreeRewardModel(nn.Module):
    """The reward function as a module with a backbone and a score, the only form that the old PPO accepts."""

    base_model_prefix = "backbone"

    def backbone(self, input_ids, **kwargs):
        return argparse.Namespace(hidden_states=[input_ids[..., None]])

    def score(self, hidden):
        return (hidden % 2 == 0).float()


def run_ppo_1_12(row: Row, shape: Shape, rollouts: int, clock: Clock) -> None:
    """The PPO that TRL removed in 1.13. It is one loop, so its phases are recognised by their first calls."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = build_tokenizer(shape)
    ids = tokenizer(build_prompts(shape))["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                kl_coef=BETA,
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=shape.batch,
                local_rollout_forward_batch_size=shape.batch,
                num_ppo_epochs=row.epochs,
                total_episodes=(rollouts + WARM_UP + 1) * shape.batch,
                response_length=shape.completion,
                temperature=1.0,
                num_sample_generations=0,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            processing_class=tokenizer,
            model=build_model(shape),
            ref_model=None,
            reward_model=FreeRewardModel(),
            value_model=build_model(shape, LlamaForSequenceClassification),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            eval_dataset=Dataset.from_dict({"input_ids": ids[:1]}),
            peft_config=lora_config(row),
        )
    generate = clock.timed("generation", ppo_trainer.batch_generation)
    scored_since = trained_since = None

    def marked_generation(*args):
        nonlocal scored_since
        clock.start_rollout()
        output = generate(*args)
        scored_since = clock.now()
        return output

    accumulate, log = trainer.accelerator.accumulate, trainer.log

    def first_of_rollout(*args):
        nonlocal scored_since, trained_since
        if scored_since is not None:
            clock.add("scoring", scored_since)
            scored_since, trained_since = None, clock.now()
        return accumulate(*args)

    def log_after_training(*args):
        clock.add("training", trained_since)
        return log(*args)

    ppo_trainer.batch_generation = marked_generation
    trainer.accelerator.accumulate, trainer.log = first_of_rollout, log_after_training
    trainer.train()


RUN = {"floor": run_floor, "rloo": run_hosted, "ppo": run_hosted, "gdc": run_hosted, "ppo_1_12": run_ppo_1_12}


def resident_mib() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def measured(run: Callable[[Shape, int, Clock], None], shape: Shape, steps: int) -> tuple[Clock, float]:
    """The clock of a run, and its peak memory minus the memory that was resident before it, in MiB."""
    # a miniature run first makes the pages of the libraries resident before the memory of this run is measured
    run(Shape(layers=1, hidden=8, vocabulary=16, prompt=2, completion=2, batch=4), 1, Clock())
    gc.collect()
    resident = resident_mib()
    clock = Clock()
    run(shape, steps, clock)
    return clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--row", type=json.loads, required=True)
    parser.add_argument("--shape", type=json.loads, default={})
    parser.add_argument("--rollouts", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    row, shape = Row(**args.row), Shape(**args.shape)
    clock, memory = measured(lambda *run: RUN[row.method](row, *run), shape, args.rollouts)
    print(json.dumps({"row": asdict(row), "memory_mib": memory, **clock.medians(shape.batch)}))


if __name__ == "__main__":
    main()

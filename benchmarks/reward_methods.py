"""
What votes, annotators and ensembles improve: reward models on real preferences, compared on held-out topics.

    python benchmarks/reward_methods.py --data ukp --folder <data> --model <small causal LM>
    python benchmarks/reward_methods.py --data hh --folder <data> --model <small causal LM>
    python benchmarks/reward_methods.py --data ukp ... --method '4 LoRA adapters'      these beside the label
    python benchmarks/reward_methods.py --data ukp ... --quick                         one seed, few pairs

`<data>` holds `ukp_convarg1/` or `hh_rlhf/` (`preference_files.py` says in which form), neither of which is part of
this repository. All methods are trained from the same base with the same settings on the same pairs, and evaluated on
the same held-out pairs. A seed decides what is held out, the weights of the head and the order of the pairs. A table
entry is the mean over seeds ± its standard error; a difference is the mean of the differences within a seed. With a
base of 260,000 parameters a run takes about 25 minutes on one core; adapters, which the default leaves out, take as
long again.

- Two baselines must be beaten: a Bradley–Terry fit on word counts, which sees the votes and whose prior is chosen on
  topics of its training set, and the number of words alone.
- Log loss, Brier score and calibration use the share of votes as target, in which a tie is half a vote for either
  side, or the single judgement of a pair. Accuracy uses the plurality, vote accuracy a vote drawn at random. Ties are
  left out of both.
- With reliability, σ(Δ) is the preference behind the votes. A separate row predicts votes, which err with the mean
  error rate of the training set.
- Pairs without a plurality are left out where labels are used. A pair too long for the model loses the beginning of
  its prompt, and is left out if too little would remain.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import preference_files as files
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from rlhf_bayes import RewardConfig, RewardTrainer
from rlhf_bayes.commands.quiet import quiet
from rlhf_bayes.diagnostics import plot_reliability
from rlhf_bayes.diagnostics.bag_of_words import BagOfWords
from rlhf_bayes.numerics import agreement, noise_from_agreement
from rlhf_bayes.numerics.bradley_terry import preference_metrics
from rlhf_bayes.numerics.calibration import reliability_bins

NOTHING, LENGTH, WORDS, LABEL = "no model (Δ = 0)", "number of words", "bag of words", "label"
VOTES, RELIABILITY, OF_A_VOTE = "share of votes", "votes, reliability", "  as a vote that may err"
SMOOTHED, HEADS, LORA = "label, smoothed", "4 heads", "4 LoRA adapters"
# average agreement of crowd workers and researchers: Bai et al. 2022, arXiv 2204.05862
HH_AGREEMENT = 0.63
MEMBERS = 4
L2 = (10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class Method:
    """The columns that a method reads besides the texts, and its fields of RewardConfig."""

    columns: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "ukp": {
        LABEL: Method(),
        VOTES: Method(("chosen_prob",)),
        RELIABILITY: Method(("annotators", "annotator_votes"), {"annotator_reliability": True}),
        HEADS: Method(("chosen_prob",), {"num_members": MEMBERS}),
        LORA: Method(("chosen_prob",), {"num_members": MEMBERS, "ensemble": "lora"}),
    },
    "hh": {
        LABEL: Method(),
        SMOOTHED: Method((), {"annotator_agreement": HH_AGREEMENT}),
        HEADS: Method((), {"num_members": MEMBERS}),
        LORA: Method((), {"num_members": MEMBERS, "ensemble": "lora"}),
    },
}
# K adapters take K times as long, so the default leaves them out
DEFAULT_METHODS = {data: [name for name in methods if name != LORA] for data, methods in METHODS.items()}
COLUMNS = {
    "log_loss": "log loss, nats",
    "brier": "Brier",
    "ece": "calibration error",
    "accuracy": "accuracy",
    "vote_accuracy": "vote accuracy",
}
DIFFERENCES = ("log_loss", "brier", "accuracy")


@dataclass(frozen=True)
class Judged:
    """Predictions of a method for the held-out pairs of one seed."""

    chosen: Tensor
    """(K, N) rewards."""
    rejected: Tensor
    """(K, N)."""
    seconds: float = 0.0

    @property
    def prob(self) -> Tensor:
        """(N,): mean over members of σ(Δ)."""
        return (self.chosen - self.rejected).double().sigmoid().mean(0)


def metrics_of(judged: Judged, pairs: files.Pairs) -> dict[str, float]:
    return preference_metrics(judged.chosen, judged.rejected, pairs.target, pairs.votes)


def judge_words(pairs: files.Pairs, seed: int, max_words: int | None) -> Judged:
    """A fit on word counts; the precision of its prior is chosen on topics held out of the training set."""
    started = time.process_time()

    def fit(rows: list[files.Row], l2: float) -> BagOfWords:
        targets = [row.get("chosen_prob", 1.0) for row in rows]
        texts = ([row[side] for row in rows] for side in ("chosen", "rejected"))
        return BagOfWords.fit(*texts, targets, l2=l2, max_words=max_words, bigrams=True)

    def rewards(fitted: BagOfWords, rows: list[files.Row]) -> list[Tensor]:
        return [fitted.rewards([row[side] for row in rows])[None] for side in ("chosen", "rejected")]  # (1, N) each

    inner = files.split(pairs.train, seed, share=0.25)
    losses = {}
    for l2 in L2:
        losses[l2] = metrics_of(Judged(*rewards(fit(inner.train, l2), inner.test)), inner)["log_loss"]
    fitted = fit(pairs.train, min(losses, key=losses.__getitem__))
    return Judged(*rewards(fitted, pairs.test), time.process_time() - started)


def judge_nothing(pairs: files.Pairs) -> Judged:
    return Judged(torch.zeros(1, len(pairs.test)), torch.zeros(1, len(pairs.test)))


def make_trainer(
    method: Method,
    pairs: files.Pairs,
    seed: int,
    args: argparse.Namespace,
    on_step: Callable[[int, int], None],
    folder: str | Path,
) -> RewardTrainer:
    """A trainer of one reward model on the CPU, which says nothing."""
    rows = pairs.train
    if not method.columns and "votes" in rows[0]:
        rows = [row for row in rows if row["votes"][0] != row["votes"][1]]
    lora = method.options.get("ensemble") == "lora"
    names = ("prompt", "chosen", "rejected")
    trainer = RewardTrainer(
        model=str(args.model),
        args=RewardConfig(
            output_dir=str(folder),
            seed=seed,
            learning_rate=args.lora_learning_rate if lora else args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.05,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=2 * args.batch,
            max_length=None,
            # keep the order of `in_batches_of_like_length`
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **method.options,
        ),
        train_dataset=dataset(files.in_batches_of_like_length(rows, args.batch, seed), (*names, *method.columns)),
        eval_dataset=dataset(pairs.test, names),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear") if lora else None,
        callbacks=[StepCallback(on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_and_judge(
    method: Method, pairs: files.Pairs, seed: int, args: argparse.Namespace, on_step: Callable[[int, int], None]
) -> dict[str, Judged]:
    """Train one reward model; returns its predictions by row of the table. Reliability has two rows."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(method, pairs, seed, args, on_step, folder)
        trainer.train()
        trainer.evaluate()
    found = trainer.evaluation_pairs
    judged = Judged(found["chosen"], found["rejected"], time.process_time() - started)
    if not method.options.get("annotator_reliability"):
        return {"": judged}
    return {"": judged, OF_A_VOTE: of_a_vote(judged, mean_error_rate(trainer.annotator_error_rates, pairs.train))}


def dataset(rows: list[files.Row], columns: Iterable[str]) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def mean_error_rate(rates: dict[str, float], rows: list[files.Row]) -> float:
    """The mean error rate over votes, in which an annotator counts as often as they voted."""
    return statistics.mean(rates[annotator] for row in rows for annotator in row["annotators"])


def of_a_vote(judged: Judged, error_rate: float) -> Judged:
    """Predictions of votes: the difference of rewards whose σ is (1 − ε)·σ(Δ) + ε·σ(−Δ)."""
    delta = ((1 - error_rate) * judged.prob + error_rate * (1 - judged.prob)).logit()[None]  # (1, N)
    return Judged(delta, torch.zeros_like(delta), judged.seconds)


class StepCallback(TrainerCallback):
    """Shows the progress of training."""

    def __init__(self, on_step: Callable[[int, int], None]):
        self.on_step = on_step

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step(state.global_step, state.max_steps)


Results = dict[str, list[dict[str, float]]]  # metrics by method, one entry per seed


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error over seeds; the error of a single seed is unknown."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def results_table(results: Results, title: str) -> Table:
    table = Table(title=title)
    table.add_column("method")
    columns = {key: label for key, label in COLUMNS.items() if key in results[NOTHING][0]}
    for label in (*columns.values(), "CPU seconds"):
        table.add_column(label, justify="right")
    for name, seeds in results.items():
        cells = [mean_and_error([seed[key] for seed in seeds]) if key in seeds[0] else "" for key in columns]
        table.add_row(name, *cells, f"{statistics.mean(seed['seconds'] for seed in seeds):.0f}")
    return table


def differences_table(results: Results) -> Table:
    """The difference of each method to training on the label, within a seed."""
    table = Table(title="Difference to the label, on the same pairs", caption="log loss and Brier: lower is better")
    table.add_column("method")
    for key in DIFFERENCES:
        table.add_column(COLUMNS[key], justify="right")
    for name, seeds in results.items():
        if name not in (NOTHING, LABEL):
            pairs = list(zip(seeds, results[LABEL], strict=True))
            table.add_row(
                name, *(mean_and_error([ours[key] - label[key] for ours, label in pairs]) for key in DIFFERENCES)
            )
    return table


def bounds(pairs: list[files.Pairs]) -> str:
    """The bounds that no method can beat, in words."""
    if pairs[0].votes is None:
        ceiling = 1 - noise_from_agreement(HH_AGREEMENT)
        return f"Where annotators agree on {HH_AGREEMENT:.0%} of pairs, accuracy cannot pass {ceiling:.3f}."
    shares = [p.target for p in pairs]
    entropies = [float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean()) for p in shares]
    agreements = [agreement(p.votes) for p in pairs]
    ceilings = [1 - noise_from_agreement(a) for a in agreements]
    return (
        f"Two votes on a held-out pair, ties apart, agree with probability {mean_and_error(agreements)}, so vote "
        f"accuracy cannot pass {mean_and_error(ceilings)}. Log loss cannot fall below the mean entropy "
        f"of the share of votes, {mean_and_error(entropies)} nats."
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(METHODS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="holds ukp_convarg1/ or hh_rlhf/")
    parser.add_argument("--model", type=Path, required=True, help="base of every reward model: a small causal LM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed: another one gives other splits")
    parser.add_argument("--train-pairs", type=int, default=2500, help="size of a random training subset; 0 for all")
    parser.add_argument("--test-pairs", type=int, default=1200, help="size of a random held-out subset; 0 for all")
    parser.add_argument("--max-length", type=int, help="tokens of a text; default: 512 for ukp, 384 for hh")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=3e-3)
    parser.add_argument("--method", dest="methods", action="append", help=f"repeat for several, '{LORA}' among them")
    parser.add_argument("--plot", type=Path, default=Path("reward_methods.png"))
    parser.add_argument("--json", type=Path, help="also write the metrics of every seed to this file")
    parser.add_argument("--quick", action="store_true", help="one seed, 64 pairs to train on, 64 held out")
    args = parser.parse_args(arguments)
    args.methods = args.methods or DEFAULT_METHODS[args.data]
    for method in args.methods:
        if method not in METHODS[args.data]:
            parser.error(f"--method must be one of {list(METHODS[args.data])} with --data {args.data}, got {method!r}")
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    # the label comes first, since the others are compared with it
    args.methods = [LABEL, *(method for method in dict.fromkeys(args.methods) if method != LABEL)]
    args.max_length = args.max_length or {"ukp": 512, "hh": 384}[args.data]
    if args.quick:
        args.seeds, args.train_pairs, args.test_pairs = 1, 64, 64
    return args


def load(args: argparse.Namespace, console: Console) -> list[files.Pairs]:
    """The pairs of each seed."""
    found = (files.load_ukp if args.data == "ukp" else files.load_hh)(args.folder)
    rows = [
        row for row in found if row["chosen"] != row["rejected"] and row["chosen"].strip() and row["rejected"].strip()
    ]
    fitting = files.fitted(rows, AutoTokenizer.from_pretrained(args.model), args.max_length)
    whole = {row["prompt"] for row in rows}
    console.print(
        f"{len(found)} pairs. Left out: {len(found) - len(rows)} with an empty text or two identical ones, "
        f"{len(rows) - len(fitting)} that do not fit into {args.max_length} tokens. "
        f"{sum(row['prompt'] not in whole for row in fitting)} lose the beginning of their prompt.",
        highlight=False,
    )
    seeds = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        pairs = files.split(fitting, seed, 0.25, args.train_pairs or None, args.test_pairs or None)
        # the order of evaluation pairs does not matter, and sorted by length they need little padding
        pairs.test.sort(key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])))
        groups = len({row["group"] for row in pairs.test})
        console.print(
            f"Seed {seed}: {len(pairs.train)} pairs to train on, {len(pairs.test)} of {groups} held-out groups.",
            highlight=False,
        )
        seeds.append(pairs)
    return seeds


def judge(pairs: files.Pairs, seed: int, args: argparse.Namespace, progress: Progress) -> Iterable[tuple[str, Judged]]:
    """Every method on one seed's data, one after the other."""
    yield NOTHING, judge_nothing(pairs)
    yield LENGTH, judge_words(pairs, seed, max_words=0)
    yield WORDS, judge_words(pairs, seed, max_words=None)
    for name in args.methods:
        task = progress.add_task(f"seed {seed}, {name}", total=None)

        def on_step(step: int, total: int, task=task) -> None:
            progress.update(task, completed=step, total=total)

        for suffix, judged in train_and_judge(METHODS[args.data][name], pairs, seed, args, on_step).items():
            yield suffix or name, judged
        progress.remove_task(task)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    quiet(threads=1)
    console = Console(width=None if sys.stdout.isatty() else 160)
    pairs = load(args, console)
    results: Results = {}
    predictions: dict[str, list[tuple[Tensor, Tensor]]] = {}
    columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:2], MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        whole = progress.add_task("runs", total=args.seeds * len(args.methods))
        for seed, of_seed in enumerate(pairs, start=args.first_seed):
            for name, judged in judge(of_seed, seed, args, progress):
                metrics = metrics_of(judged, of_seed) | {"seconds": judged.seconds}
                results.setdefault(name, []).append(metrics)
                predictions.setdefault(name, []).append((judged.prob, of_seed.target))
                progress.update(whole, advance=name in args.methods)
                console.print(
                    f"Seed {seed}, {name.strip()}: {metrics['log_loss']:.4f} nats, "
                    f"accuracy {metrics['accuracy']:.4f}, {judged.seconds:.0f} s",
                    highlight=False,
                )
    title = f"{args.data}: held-out pairs, {args.seeds} seeds, mean ± standard error; {args.model.name}"
    console.print(results_table(results, title), differences_table(results), bounds(pairs), highlight=False)
    pooled = {name: [torch.cat(parts) for parts in zip(*seeds, strict=True)] for name, seeds in predictions.items()}
    bins = {name.strip(): reliability_bins(*both) for name, both in pooled.items() if name not in (NOTHING, LENGTH)}
    plot_reliability(bins, args.plot)
    console.print(f"Reliability: {args.plot}", highlight=False)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

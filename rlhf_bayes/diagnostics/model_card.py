"""The model card of a reward model: its data, its metrics, and how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from rlhf_bayes.numerics import noise_from_agreement
from rlhf_bayes.numerics.calibration import ReliabilityBins
from rlhf_bayes.rewards import RewardIndex

MAX_ANNOTATORS_LISTED = 12

_KINDS = {
    "single": "one sequence classifier",
    "heads": "{} heads on one trunk",
    "lora": "{} LoRA adapters on one base, each with a head of its own",
    "models": "{} whole models",
}
_METRICS = {
    "accuracy": ("accuracy on plurality labels", "share of pairs, even votes left out"),
    "log_loss": ("log loss", "nats; log 2 = 0.693 says nothing"),
    "log_loss_member": ("log loss of a member alone", "nats, mean over members"),
    "brier": ("Brier score", "0.25 says nothing, where labels are 0 or 1"),
    "vote_accuracy": ("accuracy on single votes", "share of votes, ties left out"),
    "vote_ceiling": ("… at most, by the agreement on these pairs", "share of votes"),
    "vote_accuracy_of_ceiling": ("… as a share of that", "1 is as good as an annotator without noise"),
    "reward_chosen_mean": ("mean reward, chosen", "units of reward"),
    "reward_chosen_std": ("standard deviation of reward, chosen", "units of reward, over pairs"),
    "reward_rejected_mean": ("mean reward, rejected", "units of reward"),
    "reward_rejected_std": ("standard deviation of reward, rejected", "units of reward, over pairs"),
    "disagreement": ("standard deviation of Δ over members", "units of reward"),
    "disagreement_vote": ("members prefer different texts", "share of pairs"),
}


@dataclass(frozen=True)
class PreferenceSummary:
    """
    A summary of the comparisons that a reward model was trained on, for its card.

    Args:
        dataset (`str`): name of the data.
        num_train (`int`): pairs trained on.
        num_eval (`int`): held-out pairs; 0 if there were none.
        labels (`str`): the kind of labels: votes, the plurality, a probability.
        split (`str`, *optional*): how the held-out pairs were chosen: by topic, at random.
        num_dropped (`int`): pairs left out of training, because they were too long or unusable.
        agreement (`float`, *optional*): probability that two votes on a pair agree, ties left out, in [0, 1].
        error_rates (`Mapping[str, float]`, *optional*): annotator -> probability of a wrong vote, as learnt.

    Raises:
        ValueError: if a count is negative, or a rate is outside [0, 1].
    """

    dataset: str
    num_train: int
    num_eval: int
    labels: str = "one label a pair"
    split: str | None = None
    num_dropped: int = 0
    agreement: float | None = None
    error_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("num_train", "num_eval", "num_dropped"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}: it counts pairs.")
        rates = {"agreement": self.agreement} if self.agreement is not None else {}
        for name, rate in (rates | {f"error_rates[{key!r}]": rate for key, rate in self.error_rates.items()}).items():
            if not 0 <= rate <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {rate}: it is a probability.")


def reward_model_card(
    name: str,
    index: RewardIndex,
    data: PreferenceSummary,
    base_model: str | None = None,
    metrics: Mapping[str, float] | None = None,
    bins: ReliabilityBins | None = None,
    reliability_plot: str | None = None,
    settings: Mapping[str, object] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """
    A model card in Markdown, with the YAML header that the hub reads.

    Args:
        name (`str`):
            Name of the repository or folder, as users load it.
        index ([`~rlhf_bayes.rewards.RewardIndex`]):
            The facts stored beside the weights: the kind of ensemble, EOS, normalisation.
        data ([`PreferenceSummary`]):
            The comparisons it was trained on.
        base_model (`str`, *optional*):
            The model that training started from. It is put into the header unless it is a local folder.
        metrics (`Mapping[str, float]`, *optional*):
            Metrics on held-out pairs, from `trainer.evaluate()` or [`~rlhf_bayes.numerics.preference_metrics`].
        bins (`ReliabilityBins`, *optional*):
            Calibration on the same pairs.
        reliability_plot (`str`, *optional*):
            File of the reliability plot, relative to the card.
        settings (`Mapping[str, object]`, *optional*):
            Settings of training to show.
        tags (`Sequence[str]`, *optional*):
            Further tags for the hub.

    Raises:
        ValueError: if there are metrics or bins but `data` counts no held-out pairs.
    """
    if data.num_eval == 0 and (metrics or bins is not None):
        raise ValueError(
            "`data.num_eval` must count the held-out pairs that `metrics` and `bins` come from, got 0. Set it, or "
            "leave both out."
        )
    metrics = {key.removeprefix("eval_"): value for key, value in (metrics or {}).items()}
    base_is_local = base_model is not None and Path(base_model).exists()
    parts = [
        _header(index, None if base_is_local else base_model, tags),
        _introduction(name, index, base_model, base_is_local),
        _data(data, settings or {}),
        _annotators(data, "vote_ceiling" in metrics),
        _accuracy(data, metrics),
        _calibration(metrics, bins, reliability_plot),
        _normalisation(index),
        _loading(name, index),
        _plain(name, index),
    ]
    return "\n\n".join(parts) + "\n"


def _header(index: RewardIndex, base_model: str | None, tags: Sequence[str]) -> str:
    card_data = ModelCardData(
        base_model=base_model,
        library_name="peft" if index.kind == "lora" else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "trl", "rlhf_bayes", *(["reward-ensemble"] if index.num_members > 1 else []), *tags],
    )
    return f"---\n{card_data.to_yaml()}\n---"


def _introduction(name: str, index: RewardIndex, base_model: str | None, base_is_local: bool) -> str:
    # of a local folder only the last part is shown, since others do not have it
    base = None if base_model is None else f" from `{Path(base_model).name if base_is_local else base_model}`"
    return (
        f"# {Path(name).name}\n\nA reward model: {_KINDS[index.kind].format(index.num_members)}, trained{base or ''} "
        "on comparisons of two completions of one prompt.\n\n"
        "    P(chosen ≻ rejected) = σ(r(chosen) − r(rejected))\n\n"
        "A reward is defined up to a constant for each prompt: compare completions of one prompt only."
    )


def _data(data: PreferenceSummary, settings: Mapping[str, object]) -> str:
    dropped = f" Left out: {data.num_dropped:,} pairs." if data.num_dropped else ""
    lines = [
        f"- Dataset: {data.dataset}",
        f"- Pairs: {data.num_train:,} for training, {data.num_eval:,} held out"
        f"{f' ({data.split})' if data.split else ''}.{dropped}",
        f"- Labels: {data.labels}",
    ]
    lines += [f"- `{key}`: {value}" for key, value in settings.items()]
    return "## Data\n\n" + "\n".join(lines)


def _annotators(data: PreferenceSummary, has_ceiling: bool) -> str:
    if data.agreement is None:
        text = "Not measured: no pair has several votes. How often a perfect model would be right is not known."
    elif data.agreement > 0.5:
        noise = noise_from_agreement(data.agreement)
        text = (
            f"Two votes on a pair agree with probability {data.agreement:.3f} (ties left out). If votes err "
            f"independently with probability ε, that is (1 − ε)² + ε²: ε = {noise:.3f}"
        )
        # the votes of the held-out pairs have an agreement of their own, and a card names one ceiling
        text += "." if has_ceiling else f", and no model can be right on more than {1 - noise:.3f} of single votes."
    else:
        text = (
            f"Two votes on a pair agree with probability {data.agreement:.3f} (ties left out): no more than by "
            "chance, so the labels say next to nothing."
        )
    rates = data.error_rates
    if len(rates) > MAX_ANNOTATORS_LISTED:
        low, middle, high = torch.tensor(list(rates.values())).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        text += (
            f"\n\nLearnt probability of a wrong vote, over {len(rates)} annotators: median {middle:.3f}, one in ten "
            f"below {low:.3f}, one in ten above {high:.3f}."
        )
    elif rates:
        rows = [(_cell(annotator), f"{rate:.3f}") for annotator, rate in rates.items()]
        text += "\n\n" + _table(("annotator", "learnt probability of a wrong vote"), rows)
    return "## Agreement of the annotators\n\n" + text


def _accuracy(data: PreferenceSummary, metrics: Mapping[str, float]) -> str:
    rows = [(label, _with_interval(key, metrics), unit) for key, (label, unit) in _METRICS.items() if key in metrics]
    if not rows:
        return "## Held-out accuracy\n\nNot measured."
    return f"## Held-out accuracy\n\nOn {data.num_eval:,} pairs.\n\n" + _table(("metric", "value", ""), rows)


def _with_interval(key: str, metrics: Mapping[str, float]) -> str:
    value = f"{metrics[key]:.3f}"
    if f"{key}_low" not in metrics:
        return value
    return f"{value} (95% interval {metrics[f'{key}_low']:.3f} to {metrics[f'{key}_high']:.3f})"


def _calibration(metrics: Mapping[str, float], bins: ReliabilityBins | None, plot: str | None) -> str:
    parts = ["## Calibration"]
    if "ece" in metrics:
        parts.append(
            f"Expected calibration error {metrics['ece']:.3f}: the mean distance between confidence and the share of "
            "votes for the predicted text."
        )
    if bins is not None:
        columns = torch.stack([bins.confidence, bins.accuracy, bins.weight], dim=1)  # (num_bins, 3)
        rows = [tuple(f"{value:.3f}" for value in row) for row in columns[bins.weight > 0].tolist()]
        parts.append(_table(("confidence", "votes for the predicted text", "share of pairs"), rows))
    if plot is not None:
        parts.append(f"![Reliability]({plot})")
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Not measured."])


def _normalisation(index: RewardIndex) -> str:
    if index.normalization is None:
        text = (
            "None is stored: rewards are raw logits, and an inverse temperature 1/β has no meaning that carries over "
            "from another model. `normalize(prompts, completions, reference=…)` fits one."
        )
    else:
        rows = [
            (_cell(member), f"{gain:.4g}", f"{bias:.4g}")
            for member, gain, bias in zip(
                index.members, index.normalization.gain, index.normalization.bias, strict=True
            )
        ]
        text = (
            f"r = gain · logit + bias has mean 0 and standard deviation 1 on {index.normalization.reference}; applied "
            "when the classes below score.\n\n" + _table(("member", "gain", "bias"), rows)
        )
    return "## Normalisation\n\n" + text


def _loading(name: str, index: RewardIndex) -> str:
    if index.kind == "single":
        load = f"from rlhf_bayes.rewards import RewardModel\n\nreward = RewardModel({name!r})"
        more = "rewards = reward(prompts=prompts, completions=completions)  # list of floats"
    else:
        load = f"from rlhf_bayes.rewards import RewardEnsemble\n\nreward = RewardEnsemble.from_pretrained({name!r})"
        more = (
            "member_rewards = reward.member_rewards(prompts, completions)  # (K, B)\n"
            "rewards = reward(prompts=prompts, completions=completions)  # the members' mean, list of floats"
        )
    eos = "EOS is appended to texts, as in training. " if index.append_eos else ""
    return (
        f"## How to load\n\n```python\n{load}\n{more}\n```\n\n{eos}It is a reward function of TRL's protocol as "
        "it is:\n\n```python\nfrom rlhf_bayes import PPOTrainer\n\n"
        'trainer = PPOTrainer(model="your/model", reward_funcs=reward, train_dataset=dataset)\n```'
    )


def _plain(name: str, index: RewardIndex) -> str:
    eos = "with `tokenizer.eos_token` appended to each text, " if index.append_eos else ""
    if index.kind in ("lora", "models"):
        text = (
            f"No single model gives the mean of the members. `rlhf-bayes export {name} --member {index.members[0]}` "
        )
        text += "writes one of them as a classifier with one label, whose logit is its reward."
    else:
        given = {
            "nothing": "the raw logit of a member" if index.kind == "heads" else "the raw logit",
            "gain": "the normalised reward without the bias, a constant that no comparison depends on",
            "gain_and_bias": "the normalised reward",
        }[index.folded]
        text = (
            f"`AutoModelForSequenceClassification` and pipelines, {eos}give {given}; the labels say so. "
            f"`rlhf-bayes export {name}` writes a classifier with one label, whose logit is the reward"
            f"{', and whose tokenizer appends EOS' if index.append_eos else ''}."
        )
    return f"## In plain transformers\n\n{text}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")

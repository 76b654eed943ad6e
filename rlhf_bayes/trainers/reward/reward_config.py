"""Configuration of [`RewardTrainer`]."""

from dataclasses import dataclass, field

from trl import RewardConfig as TRLRewardConfig

from rlhf_bayes.numerics import noise_from_agreement
from rlhf_bayes.trainers.faults.fault_config import FaultConfig


@dataclass
class RewardConfig(FaultConfig, TRLRewardConfig):
    r"""
    Configuration of [`RewardTrainer`]: that of [`~trl.RewardConfig`], and the parameters below.

    Parameters:
        num_members (`int`, *optional*, defaults to `1`):
            Members of the ensemble, K.
        ensemble (`str`, *optional*, defaults to `"heads"`):
            What the members are: `"heads"` on one trunk, or `"lora"` adapters on one base, each with a head of its own
            (needs `peft_config`). Each member has its own initialisation.
        bootstrap (`str`, *optional*, defaults to `"pairs"`):
            What sets the members' data apart: `"pairs"`, each pair counts Poisson(1) times for each member;
            `"annotators"`, each annotator's votes go to one member; `"none"`, nothing.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            ε, the probability that a label is wrong: targets become (1−ε)·p + ε·(1−p).
        annotator_agreement (`float`, *optional*):
            Probability a that two annotators agree on a pair, in (½, 1]. Sets ε of `label_smoothing` by a = (1−ε)² +
            ε². For labels without votes.
        annotator_reliability (`bool`, *optional*, defaults to `False`):
            Whether to learn how often each annotator errs, and to trust them accordingly: each vote follows
            (1−ε_a)·σ(Δ) + ε_a·σ(−Δ). Needs the column `annotator`, or `annotators` and `annotator_votes`.
        overlong (`str`, *optional*, defaults to `"drop"`):
            What becomes of a pair of which a text has more than `max_length` tokens: `"drop"`, as in TRL; `"truncate"`
            from the left, so that the end of the completion stays; or `"error"`. Counted and reported.
        max_nonfinite_steps (`int`, *optional*, defaults to `3`):
            An optimizer step whose gradient is not finite is skipped. After so many in a row training saves a
            checkpoint and stops.
        save_on_sigterm (`bool`, *optional*, defaults to `False`):
            Whether SIGTERM, with which schedulers announce that they will kill a job, lets the optimizer step end,
            saves a checkpoint, and ends the process with status 0.
    """

    num_members: int = field(default=1, metadata={"help": "Members of the ensemble."})
    ensemble: str = field(
        default="heads",
        metadata={
            "help": "What the members are: 'heads' on one trunk, or 'lora' adapters on one base, each with a head.",
            "choices": ["heads", "lora"],
        },
    )
    bootstrap: str = field(
        default="pairs",
        metadata={
            "help": "What sets the members' data apart: resampled 'pairs', the 'annotators' dealt out, or 'none'.",
            "choices": ["pairs", "annotators", "none"],
        },
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a label is wrong, below 1/2."})
    annotator_agreement: float | None = field(
        default=None,
        metadata={
            "help": "Probability that two annotators agree on a pair; sets the label smoothing for labels without "
            "votes."
        },
    )
    annotator_reliability: bool = field(
        default=False,
        metadata={"help": "Whether to learn how often each annotator errs, and to trust them accordingly."},
    )
    overlong: str = field(
        default="drop",
        metadata={
            "help": "What becomes of pairs with more than `max_length` tokens: 'drop', 'truncate' from the left, or "
            "'error'.",
            "choices": ["drop", "truncate", "error"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_faults()
        self._check_choice("ensemble", ("heads", "lora"))
        self._check_choice("bootstrap", ("pairs", "annotators", "none"))
        self._check_choice("overlong", ("drop", "truncate", "error"))
        if not isinstance(self.num_members, int) or self.num_members < 1:
            raise ValueError(f"`num_members` must be a whole number from 1, got {self.num_members!r}. For one, use 1.")
        if self.num_members == 1 and self.bootstrap == "annotators":
            raise ValueError(
                "`bootstrap='annotators'` needs `num_members` above 1, got 1: there is nobody to share them with. Set "
                "`num_members`, or leave `bootstrap` out."
            )
        if isinstance(self.label_smoothing, bool) or not isinstance(self.label_smoothing, (int, float)):
            raise TypeError(f"`label_smoothing` must be a number, got {self.label_smoothing!r}. For none, use 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"`label_smoothing` must be in [0, 0.5), got {self.label_smoothing}: it is the probability that a "
                "label is wrong, and at 0.5 labels say nothing. Use 0.1 for one wrong label in ten."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` must be 0, got {self.label_smoothing_factor}: it belongs to "
                "classification by token. Set `label_smoothing` instead."
            )
        if self.annotator_agreement is not None:
            noise_from_agreement(self.annotator_agreement)
        noises = ("label_smoothing", "annotator_agreement", "annotator_reliability")
        given = [f"`{name}`" for name in noises if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"Only one of {', '.join(f'`{name}`' for name in noises)} may be set, got {' and '.join(given)}: "
                "each says how often labels are wrong. Keep one."
            )

    @property
    def label_noise(self) -> float:
        """ε, the probability that a label is wrong."""
        if self.annotator_agreement is not None:
            return noise_from_agreement(self.annotator_agreement)
        return self.label_smoothing

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}. Choose one of them.")

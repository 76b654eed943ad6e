"""Configuration of [`RewardTrainer`]."""

from dataclasses import dataclass, field

from trl import RewardConfig as TRLRewardConfig

from rlhf_bayes.numerics import noise_from_agreement
from rlhf_bayes.trainers.faults.fault_config import FaultConfig
from rlhf_bayes.trainers.field_help import document_fields


@document_fields
@dataclass
class RewardConfig(FaultConfig, TRLRewardConfig):
    """Configuration of [`RewardTrainer`]: that of [`~trl.RewardConfig`], and the parameters below."""

    num_members: int = field(default=1, metadata={"help": "Number of members of the ensemble."})
    ensemble: str = field(
        default="heads",
        metadata={
            "help": (
                "What a member is: 'heads' on one trunk, or 'lora' adapters on one base, each with a head of its own "
                "(needs `peft_config`). Each member has its own initialisation."
            ),
            "choices": ["heads", "lora"],
        },
    )
    bootstrap: str = field(
        default="pairs",
        metadata={
            "help": (
                "What makes the members' data differ. 'pairs': each pair counts Poisson(1) times for each member. "
                "'annotators': the votes of each annotator go to one member. 'none': nothing."
            ),
            "choices": ["pairs", "annotators", "none"],
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability ε that a label is wrong, below 1/2: the target p becomes (1−ε)·p + ε·(1−p)."},
    )
    annotator_agreement: float | None = field(
        default=None,
        metadata={
            "help": (
                "Probability a that two annotators agree on a pair, in (1/2, 1]. It sets the ε of `label_smoothing` "
                "by a = (1−ε)² + ε², for labels without votes."
            )
        },
    )
    annotator_reliability: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether to learn how often each annotator errs, and to weigh their votes by it: each vote follows "
                "(1−ε_a)·σ(Δ) + ε_a·σ(−Δ). Needs the column `annotator`, or `annotators` and `annotator_votes`."
            )
        },
    )
    overlong: str = field(
        default="drop",
        metadata={
            "help": (
                "What happens to a pair in which a text has more than `max_length` tokens. 'drop': it is left out, as "
                "in TRL. 'truncate': its texts are cut from the left, so that the end of the completion stays. "
                "'error': training stops. The number is reported."
            ),
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

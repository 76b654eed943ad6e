"""The annealed temperature of [`GDCTrainer`]."""

from transformers import TrainerState

from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig


def power_of_evidence(args: GDCConfig, beta: float, state: TrainerState) -> float:
    """β/β_t in (0, 1], where β_t goes geometrically from `beta_init` to β."""
    if args.beta_init is None:
        return 1.0
    steps = args.beta_init_steps or max(1, state.max_steps // 2)
    return (beta / args.beta_init) ** (1.0 - min(1.0, state.global_step / steps))


def check_same_beta(beta: float, saved: float) -> None:
    """
    Refuse to go on from a checkpoint of another target.

    Raises:
        ValueError: if its β differs.
    """
    if beta != saved:
        raise ValueError(
            f"`beta` must be that of the checkpoint, {saved}, got {beta}: Z and what was drawn belong to the target "
            "of before. Resume with it, or start from the weights of the checkpoint: pass the folder as the model, "
            "and the prior as `ref_model`."
        )


def check_annealing(args: GDCConfig, beta: float) -> None:
    """
    Refuse an annealing that does not come from a posterior nearer to the prior.

    Raises:
        ValueError: if `beta_init` is not above β.
    """
    if args.beta_init is not None and args.beta_init <= beta:
        raise ValueError(
            f"`beta_init` must be above `beta` = {beta}, got {args.beta_init}: annealing goes from a posterior nearer "
            "to the prior to the one asked for. Raise it, or leave it out."
        )

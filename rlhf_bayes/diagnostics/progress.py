"""A progress bar that shows metrics of training."""

from typing import ClassVar

from transformers import ProgressCallback


class PosteriorProgress(ProgressCallback):
    """
    A progress bar that shows the latest reward, KL to the prior, ELBO, and KLs to and from the posterior.

    The KL to the posterior, the gap, has its standard error.

    It shows those of them that the trainer logs, and prints no dictionary at each logging step. Use it in the place of
    [`~transformers.ProgressCallback`]:

        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PosteriorProgress())
    """

    FIGURES: ClassVar = {
        "reward": "reward",
        "posterior/kl_to_prior": "KL",
        "posterior/elbo": "ELBO",
        "posterior/gap": "gap",
        "posterior/forward_kl": "KL(π*‖π)",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs is not None:
            figures = {label: self._shown(logs, key) for key, label in self.FIGURES.items() if key in logs}
            if figures:
                self.training_bar.set_postfix(figures)

    @staticmethod
    def _shown(logs: dict, key: str) -> str:
        error = logs.get(f"{key}_standard_error") if key == "posterior/gap" else None
        return f"{float(logs[key]):.2f}" + ("" if error is None else f"±{float(error):.2f}")

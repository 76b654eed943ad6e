"""A progress bar that shows metrics of training."""

from typing import ClassVar

from transformers import ProgressCallback


class PosteriorProgress(ProgressCallback):
    """
    A progress bar that shows the latest reward, KL to the prior, ELBO and KL from the posterior.

    It shows those of them that the trainer logs, and prints no dictionary at each logging step. Use it in the place of
    [`~transformers.ProgressCallback`]:

        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(PosteriorProgress())
    """

    FIGURES: ClassVar = {
        "reward": "reward",
        "posterior/kl_to_prior": "KL",
        "posterior/elbo": "ELBO",
        "posterior/forward_kl": "KL(π*‖π)",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs is not None:
            figures = {label: logs[key] for key, label in self.FIGURES.items() if key in logs}
            if figures:
                self.training_bar.set_postfix({label: f"{float(value):.2f}" for label, value in figures.items()})

"""
Contact with `RLOOTrainer`: corrections of how it treats prompts, names of rewards, and metrics.

`PRIVATE_NAMES` lists the names that this relies on; `tests/trainers/_trl/test_rloo_repairs.py` fails by name when a
TRL release moves one.
"""

import logging

from trl import RLOOTrainer

from rlhf_bayes.lm.prompt_ids import ends_texts_with_eos, without_final_eos
from rlhf_bayes.rewards.scoring import distinct_names
from rlhf_bayes.trainers.rollout.checks import check_policy

logger = logging.getLogger(__name__)

PRIVATE_NAMES = {"_tokenize_prompts": ("prompts",)}
PRIVATE_ATTRIBUTES = ("_metrics", "_tokenizer", "reward_func_names")


class RepairedRLOO(RLOOTrainer):
    """
    `RLOOTrainer` with prompts that do not end with EOS, and with one metric for each reward and dataset.

    Not for direct use: see [`PPOTrainer`].
    """

    def __init__(self, model, reward_funcs, args, **trl_arguments):
        check_policy(model, trl_arguments.get("peft_config"))
        self._evaluated = "eval"  # prefix of the metrics in the current evaluation
        super().__init__(model, reward_funcs, args, **trl_arguments)
        self.reward_func_names = distinct_names(self.reward_func_names)
        own = getattr(self.model.config.get_text_config(), "router_aux_loss_coef", None)
        if own:
            logger.warning(
                f"`router_aux_loss_coef` is {own} in the model's config and taken as 0: a load-balancing term would "
                "move the optimum off the posterior. Watch the balance of the experts if the training is long."
            )

    def _tokenize_prompts(self, prompts):
        ids, *others = super()._tokenize_prompts(prompts)
        if isinstance(prompts[0], str) and ends_texts_with_eos(self._tokenizer):
            ids = [without_final_eos(row, self._tokenizer) for row in ids]
        return ids, *others

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """See [`~transformers.Trainer.evaluate`]; with several datasets each has its own metrics `eval_<name>_…`."""
        before, self._evaluated = self._evaluated, metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated = before

    def log(self, logs, start_time=None):
        """See [`~transformers.Trainer.log`]."""
        # TRL prefixes its metrics with "eval_" for every dataset, so the name of the dataset is added here
        dataset = self._evaluated.removeprefix("eval").removeprefix("_")
        if dataset and not self.model.training:
            metrics = self._metrics["eval"]
            for name in list(metrics):
                metrics[f"{dataset}_{name}"] = metrics.pop(name)
        super().log(logs, start_time)

"""
Contact with the engines of `RLOOTrainer`, vLLM and continuous batching: keeps their log-probs of what they draw.

`RLOOTrainer` drops these log-probs, and takes those of the trainer's own pass in their place. But an engine computes
with other kernels and often in another precision, so that it draws from another distribution than the one that the
trainer scores. Here its log-probs become those of the proposal.

`tests/trainers/_trl/test_engine_draws.py` fails by name when a TRL release moves one of the names that this relies on.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, final

import torch

from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.lm.engine import NOTABLE_ESS, EngineError, check_count, check_room, engine_rows, mismatch, row_sums
from rlhf_bayes.objectives import Rollout

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

logger = logging.getLogger(__name__)

PRIVATE_ATTRIBUTES = (
    "use_vllm",
    "vllm_mode",
    "use_transformers_continuous_batching",
    "continuous_batching_config",
)


@final
class EngineDraws:
    """
    The draws of a trainer's engine, with the engine's own log-probs.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, whose `_in_flight` gets the log-probs of each rollout.
    """

    def __init__(self, trainer: "RolloutTrainer"):
        self.trainer = trainer
        self._log_probs: Sequence[Sequence[float | None]] | None = None
        self._lost: Exception | None = None
        self._said: set[str] = set()

    @property
    def name(self) -> str | None:
        """Name of the engine; None where the trainer's own model draws."""
        if self.trainer.use_vllm:
            return "vLLM"
        return "continuous batching" if self.trainer.use_transformers_continuous_batching else None

    def draw(self, prompt_ids: list[list[int]], draw: Callable[[], list[list[int]]]) -> list[list[int]]:
        """
        Completions as `draw` returns them. Those of an engine are checked, and their log-probs kept.

        Args:
            prompt_ids (`list[list[int]]`):
                B prompts.
            draw (`Callable`):
                Calls `RLOOTrainer`, and returns B completions.

        Raises:
            ValueError: if the engine has no room for the longest completion.
            EngineError: in all processes, if the engine of one fails or returns something else than completions.
        """
        trainer, name = self.trainer, self.name
        if name is None:
            return draw()
        limit = trainer.args.vllm_max_model_length if trainer.use_vllm else None
        if limit is not None:
            check_room("`vllm_max_model_length`", list(map(len, prompt_ids)), trainer.max_completion_length, limit)
        self._log_probs, self._lost, completion_ids = None, None, []
        trainer._failures.errors.clear()
        try:
            with self._asked_for_log_probs():
                completion_ids = draw()
            if self._lost is not None:
                raise self._lost
            completion_ids = self._kept(name, completion_ids, len(prompt_ids))
        except EngineError as error:
            trainer._failures.errors.append(error)
        except Exception as error:
            failure = EngineError(f"{name} failed while it drew completions: {type(error).__name__}: {error}")
            failure.__cause__ = error
            trainer._failures.errors.append(failure)
        trainer._failures.stop_all(trainer.accelerator.num_processes)
        return completion_ids

    def report(self, rollout: Rollout) -> None:
        """
        Log how far the engine's distribution is from the policy's, and the policy's mean reward.

        Args:
            rollout ([`Rollout`]):
                What the engine drew, scored by the trainer.

        Raises:
            EngineError: if it is further than `max_engine_mismatch`.
        """
        if rollout.drawn_from != "engine":
            return
        trainer = self.trainer
        columns = [rollout.token_log_probs.sum(-1), rollout.log_proposal, rollout.rewards]
        log_policy, log_proposal, rewards = trainer.accelerator.gather(torch.stack(columns, dim=-1)).unbind(-1)
        kl, ess = (value.item() for value in mismatch(log_policy, log_proposal))
        trainer.log_metric("engine/mismatch", kl)
        trainer.log_metric("engine/ess", ess)
        scored = rewards.isfinite()
        if scored.any():
            shares = (log_policy - log_proposal)[scored].softmax(0)
            trainer.log_metric("engine/reward", (shares * rewards[scored]).sum().item())
        self._judge(kl, ess, len(rewards))

    def _kept(self, name: str, completion_ids: list[list[int]], num_requests: int) -> list[list[int]]:
        check_count(name, len(completion_ids), num_requests)
        if self._log_probs is None:
            self._say(
                f"{name} returned no log-probs of what it drew: completions count as drawn by the policy as the "
                "trainer scores it, and the difference of the two is not corrected."
            )
            return completion_ids
        rows = engine_rows(
            name,
            completion_ids,
            self._log_probs,
            num_requests,
            self.trainer._eos_ids,
            self.trainer.max_completion_length,
        )
        self.trainer._in_flight.engine_log_probs = row_sums(rows.token_log_probs, self.trainer.accelerator.device)
        return rows.completion_ids

    @contextmanager
    def _asked_for_log_probs(self) -> Iterator[None]:
        """A context in which the engine is asked for log-probs, which are kept as it returns."""
        trainer = self.trainer
        if trainer.use_vllm:
            engine, name, listen = trainer.vllm_generation, "generate", self._hear_vllm
            engine.logprobs = 0  # of the token that was drawn, and of no other
        else:
            engine, name, listen = base_causal_lm(trainer._plain_policy), "generate_batch", self._hear_batches
            trainer.continuous_batching_config.return_logprobs = True
        draw = getattr(engine, name)
        with (
            replaced(engine, name, lambda *args, **kwargs: listen(draw(*args, **kwargs))),
            self._server_may_fail() if trainer.use_vllm and trainer.vllm_mode == "server" else nullcontext(),
        ):
            yield

    @contextmanager
    def _server_may_fail(self) -> Iterator[None]:
        """A context in which a failure of the server, which one process alone would see, is an empty answer to all."""
        client = getattr(self.trainer.vllm_generation, "vllm_client", None)
        if client is None:  # only the first process talks to the server, and the others wait for what it says
            yield
            return
        ask = client.generate

        def generate(*args, **kwargs):
            try:
                return ask(*args, **kwargs)
            except Exception as error:
                self._lost = error
                return {"prompt_ids": [], "completion_ids": [], "logprobs": None, "logprob_token_ids": None}

        with replaced(client, "generate", generate):
            yield

    def _hear_vllm(self, returned: tuple) -> tuple:
        _, completion_ids, log_probs, token_ids = returned
        if log_probs is not None:
            self._log_probs = [
                [_of_token(*step) for step in zip(*row, strict=True)]
                for row in zip(completion_ids, log_probs, token_ids, strict=True)
            ]
        return returned

    def _hear_batches(self, returned: dict[str, Any]) -> dict[str, Any]:
        rows = list(returned.values())
        if all(len(row.logprobs) == len(row.generated_tokens) for row in rows):
            self._log_probs = [row.logprobs for row in rows]
        return returned

    def _judge(self, kl: float, ess: float, rows: int) -> None:
        bound = self.trainer.args.max_engine_mismatch
        far = f"{self.name} draws from another distribution than the policy: {kl:.3g} nats per sequence from it"
        if bound is not None and kl > bound:
            error = EngineError(
                f"{far}, more than `max_engine_mismatch` = {bound:g}, over {rows} completions. It holds other "
                "weights, or computes too coarsely: load it with the policy's weights and `dtype`, shorten the "
                "completions, or raise the bound. `max_engine_mismatch=None` only logs it."
            )
            self.trainer._failures.errors.append(error)
            self.trainer._failures.stop_all(1)  # all processes judge by the same numbers
        if ess < NOTABLE_ESS:
            self._say(
                f"{far}. Weights correct for it, but of {rows} completions {ess * rows:.1f} count (`engine/ess`). An "
                "engine in the policy's precision, or shorter completions, cost less."
            )

    def _say(self, text: str) -> None:
        kind = text.split(":")[0]
        if kind not in self._said and self.trainer.accelerator.is_main_process:
            self._said.add(kind)
            logger.warning(text)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an attribute of an object is another one."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)  # that of its class is seen again
        else:
            setattr(owner, name, own)


def _of_token(token: int, log_probs: Sequence[float | None], token_ids: Sequence[int]) -> float | None:
    """The log-prob of a token among those that were returned for its place; None if it is not among them."""
    return log_probs[token_ids.index(token)] if token in token_ids else None

"""Draws as a table of pandas, as a dataset, and as ArviZ's inference data."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

    from rlhf_bayes.samplers.draws import Draws


def columns_of(draws: "Draws") -> dict[str, list]:
    """
    The columns of a table with a row for each completion.

    `prompt_index`, `prompt`, `completion` (a text, or one message for a chat), `text`, `completion_ids`, `weight` (the
    sum over the rows of a prompt is 1), `log_weight` (nats; only where rows are weighted), `chain` and `step`.
    """
    columns: dict[str, list] = {
        "prompt_index": draws.prompt_index.tolist(),
        "prompt": list(draws.prompts),
        "completion": list(draws.completions),
        "text": list(draws.texts),
        "completion_ids": list(draws.completion_ids),
        "weight": draws.weights.tolist(),
    }
    if draws.log_weights is not None:
        columns["log_weight"] = draws.log_weights.tolist()
    return columns | {"chain": draws.chain.tolist(), "step": draws.step.tolist()}


def as_pandas(draws: "Draws") -> "DataFrame":
    """The table of [`columns_of`]; `guarantee` and `info` of the draws are in its `attrs`."""
    from pandas import DataFrame

    frame = DataFrame(columns_of(draws))
    frame.attrs = {"guarantee": draws.guarantee, "info": dict(draws.info)}
    return frame


def as_dataset(draws: "Draws") -> "Dataset":
    """The table of [`columns_of`]."""
    from datasets import Dataset

    return Dataset.from_dict(columns_of(draws))


def as_arviz(draws: "Draws", values: Mapping[str, Sequence[float] | Tensor] | None = None) -> Any:
    """
    ArviZ's `InferenceData`; from ArviZ 1 on it is a `DataTree`.

    The group `posterior` holds `length` in tokens and the given values, with the dimensions (chain, draw, prompt).
    `sample_stats` holds `weight`, and `log_weight` where rows are weighted. `constant_data` holds the prompts. ArviZ
    does not apply weights: for its summaries, take draws of equal weight, such as those of
    `ImportanceSampler(num_candidates=…)`.

    Args:
        draws ([`Draws`]):
            The draws. Without Markov chains there is one chain.
        values (`Mapping[str, Sequence[float]]`, *optional*):
            name -> (B,): further numbers of the rows, for instance their rewards.

    Raises:
        ImportError: if ArviZ is not installed.
        ValueError: if prompts or chains have different numbers of rows, or values another number.
    """
    try:
        import arviz  # pyright: ignore[reportMissingImports]  optional
    except ImportError as error:
        raise ImportError(
            "`to_arviz` needs ArviZ, which is not installed. Install it: `pip install 'rlhf_bayes[arviz]'`."
        ) from error
    groups = arviz_groups(draws, values)
    dims = {name: ["prompt"] for group in groups.values() for name in group}
    from_dict: Any = arviz.from_dict  # untyped here: the releases before and after ArviZ 1 take other arguments
    if hasattr(arviz, "InferenceData"):  # before ArviZ 1
        return from_dict(**groups, dims=dims)
    return from_dict(groups, dims=dims)


def arviz_groups(
    draws: "Draws", values: Mapping[str, Sequence[float] | Tensor] | None = None
) -> dict[str, dict[str, Any]]:
    """
    Group -> variable -> array, (chain, draw, prompt) for each but the prompts themselves, which are (prompt,).

    Arguments and errors are those of [`as_arviz`].
    """
    import numpy as np

    chains, counts = int(draws.chain.max()) + 1 if len(draws) else 1, draws.counts
    if len(set(counts.tolist())) > 1 or int(counts[0]) == 0 or int(counts[0]) % chains:
        raise ValueError(
            "`to_arviz` needs the same number of rows for each prompt and each of its chains, got "
            f"{counts.tolist()} rows in {chains} chain{'s' * (chains > 1)} each. Ask the sampler for a multiple of "
            "its chains, let it draw longer, or use `to_pandas`."
        )

    def shaped(column: Any) -> Any:
        rows = torch.as_tensor(column).detach().double().cpu()
        if rows.shape != (len(draws),):
            raise ValueError(
                f"`values` must have one number a row, {len(draws)}, got shape {tuple(rows.shape)}. Take them from "
                "the rows of these draws."
            )
        # rows of a prompt are ordered by step, then by chain
        return rows.view(draws.num_prompts, -1, chains).permute(2, 1, 0).numpy()  # (chain, draw, prompt)

    posterior = {"length": shaped([float(len(ids)) for ids in draws.completion_ids])}
    posterior |= {name: shaped(column) for name, column in (values or {}).items()}
    stats = {"weight": shaped(draws.weights)}
    if draws.log_weights is not None:
        stats["log_weight"] = shaped(draws.log_weights)
    first = draws.step.eq(0) & draws.chain.eq(0)
    texts = [str(draws.prompts[row]) for row in first.nonzero().flatten().tolist()]
    return {"posterior": posterior, "sample_stats": stats, "constant_data": {"prompt_text": np.array(texts)}}

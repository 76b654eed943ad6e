"""The diversity of logged completions, step by step."""

from collections import defaultdict
from collections.abc import Sequence

from rlhf_bayes.diagnostics import distinct_n
from rlhf_bayes.diagnostics.diversity import words
from rlhf_bayes.report.run import Run, Sample


def diversity_over_training(runs: Sequence[Run]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """
    Measure -> run -> (steps, values), from the completions that TRL's `log_completions` wrote.

    `distinct-2` is computed over all completions of a step. It falls with their number, so the same number is taken at
    each step of each run. `duplicates` is the share of completions that repeat one of the same prompt and step.
    """
    by_step = {run.name: _by_step(run.samples) for run in runs}
    sizes = [len(samples) for steps in by_step.values() for samples in steps.values()]
    if not sizes:
        return {}
    size = min(sizes)
    measures: dict[str, dict[str, tuple[list[int], list[float]]]] = {"distinct-2": {}, "duplicates (share)": {}}
    for name, steps in by_step.items():
        if steps:
            order = sorted(steps)
            varied = [distinct_n([words(sample.completion) for sample in steps[step][:size]], 2) for step in order]
            measures["distinct-2"][name] = (order, varied)
            measures["duplicates (share)"][name] = (order, [duplicate_share(steps[step]) for step in order])
    return measures


def duplicate_share(samples: Sequence[Sample]) -> float:
    """Share of completions that repeat another one of the same prompt, in [0, 1)."""
    if not samples:
        return 0.0
    return 1 - len({(sample.prompt, sample.completion) for sample in samples}) / len(samples)


def _by_step(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    steps: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.step is not None:
            steps[sample.step].append(sample)
    return steps

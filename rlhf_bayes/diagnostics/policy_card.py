"""The model card of a policy: the posterior that it was trained towards, its base, and a call that draws from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData


@dataclass(frozen=True)
class TrainedPolicy:
    """What is known of a policy when its card is written."""

    name: str
    """Name of the repository, or the folder, as users load it."""
    method: str
    """Name of the method."""
    evidence: str
    """What the prior is multiplied by, in Markdown, such as "exp(r/β) for β = 0.1"."""
    base_model: str | None = None
    """Name or folder of the model that training started from."""
    is_adapter: bool = False
    """Whether adapters were saved, rather than a whole model."""
    prompt: str | Sequence[Mapping[str, str]] = "The"
    """A prompt, text or messages, for the example."""
    max_completion_length: int = 128
    """Tokens of a completion, at most."""
    temperature: float = 1.0
    """The temperature of policy and prior."""
    dataset: str | None = None
    """Name of the prompts."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings of the training that are shown."""
    citation: str = ""
    """BibTeX of the method's paper."""
    tags: Sequence[str] = ()
    """Tags for the hub."""


def policy_card(policy: TrainedPolicy) -> str:
    """A model card in Markdown, with the YAML header that the hub reads."""
    base = policy.base_model
    is_local = base is not None and Path(base).exists()
    card_data = ModelCardData(
        base_model=None if is_local else base,
        datasets=policy.dataset,
        library_name="peft" if policy.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(policy.tags),
    )
    # of a local folder only the last two parts are shown, since others do not have it
    shown = "a model that was passed as an instance"
    if base is not None:
        shown = f"`{'/'.join(Path(base).parts[-2:]) if is_local else base}`"
    kind = "Adapters of" if policy.is_adapter else "A policy that began as"
    settings = "\n".join(f"- `{name}`: {value}" for name, value in policy.settings.items())
    parts = [
        f"---\n{card_data.to_yaml()}\n---",
        f"# {Path(policy.name).name}",
        f"{kind} {shown}, trained by {policy.method} with rlhf_bayes and [TRL](https://github.com/huggingface/trl) "
        "towards the posterior\n\n    π*(x | c) = π0(x | c) · evidence(c, x) / Z(c)\n\n"
        f"whose prior π0 is that model, and whose evidence is {policy.evidence}.",
        _example(policy),
        f"## Training\n\n{settings}" if settings else "",
        f"## Citation\n\n```bibtex\n{policy.citation.strip()}\n```" if policy.citation else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _example(policy: TrainedPolicy) -> str:
    prompt = policy.prompt if isinstance(policy.prompt, str) else [dict(message) for message in policy.prompt]
    options = f"max_new_tokens={policy.max_completion_length}, do_sample=True, temperature={policy.temperature:g}"
    return (
        "## How to draw from it\n\n```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model={policy.name!r})\n'
        f"output = generator({prompt!r}, {options}, top_k=0, top_p=1.0)\n"
        'print(output[0]["generated_text"])\n```\n\n'
        "Without `top_k` and `top_p`, since another distribution than the policy's would be drawn from with them."
    )

"""`rlhf-bayes actor`: draws from a policy while another process trains it, into the store that it learns from."""

import argparse

from rlhf_bayes import cli, toy
from rlhf_bayes.commands.sample import Arguments, check, load_evidence, load_model, load_prompts, make_posterior
from rlhf_bayes.lm.vllm_model import prepare_for_new_weights
from rlhf_bayes.store import Actor

_OWN = ("store", "weights", "seed", "timeout", "max_prompts")


def run(args: argparse.Namespace) -> None:
    """Draw until the learner has finished, for parsed arguments."""
    sampling = Arguments(**{name: value for name, value in vars(args).items() if name not in _OWN})
    sampling.max_prompts = args.max_prompts
    check(sampling)
    if args.vllm:
        prepare_for_new_weights()
    prompts, columns = load_prompts(sampling)
    prior = load_model(sampling, sampling.model_name_or_path or toy.model_path())
    if sampling.likelihood is not None:
        likelihood = cli.load_likelihood(sampling.likelihood)
    else:
        likelihood = make_posterior(sampling, prior, *load_evidence(sampling))[0].likelihood
    actor = Actor(args.store, args.weights, prior, likelihood, prompts, columns, seed=args.seed, timeout=args.timeout)
    print(f"Draws into {args.store} what the learner asks for in {args.weights}.", flush=True)
    try:
        actor.run(lambda text: print(text, flush=True))
    except KeyboardInterrupt as stop:
        stop.add_note(f"{actor.num_drawn:,} completions were drawn. They are kept in {args.store}.")
        raise
    print(f"The training has ended. {actor.num_drawn:,} completions were drawn, and are kept in {args.store}.")

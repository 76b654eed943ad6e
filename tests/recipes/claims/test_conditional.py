"""Claim 7: the optima of the script against those of another optimiser."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rlhf_bayes.testing import EnumerableLM


def test_optima_are_those_of_another_optimiser(run_claim):
    _, rows = run_claim("conditional", "--seeds", 2, "--steps", 2, "--exact_steps", 1500)
    found = {(row["normaliser"], float(row["log Z"])): float(row["small family"]) for row in rows}
    assert all(float(row["all"]) < 1e-4 for row in rows)

    toy = EnumerableLM(vocab_size=6, max_completion_length=3)
    prior = toy.log_prior.double().log_softmax(-1)
    target = (prior + toy.rewards.double() / toy.beta).log_softmax(-1)
    log_z = toy.log_z().double() + torch.tensor([-4.0, 0.0, 4.0])

    def kls(tilt):
        return (target.exp() * (target - (prior + tilt).log_softmax(-1))).sum(-1)

    for kind, weights in (("one Z for all", 3 * log_z.softmax(0)), ("a Z for each prompt", torch.ones(3))):

        def loss(x, weights=weights):
            tilt = torch.tensor(x, requires_grad=True)
            value = (weights * kls(tilt)).sum()
            return value.item(), torch.autograd.grad(value, tilt)[0].numpy()

        best = minimize(loss, np.zeros(prior.size(1)), jac=True, method="L-BFGS-B", options={"maxiter": 3000})
        for value, kl in zip(log_z.tolist(), kls(torch.tensor(best.x)).tolist(), strict=True):
            ours = next(kl for (name, at), kl in found.items() if name == kind and abs(at - value) < 1e-3)
            assert ours == pytest.approx(kl, abs=5e-3)

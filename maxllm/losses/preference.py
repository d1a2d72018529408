"""Losses on preferences between completions of one prompt."""

import itertools

import jax
import jax.numpy as jnp


def pairwise(scores_BC: jax.Array, margin: float = 0.0, centering: float = 0.0) -> jax.Array:
    """Bradley-Terry loss of C completions ranked best first, one number per prompt, [B].

    Mean over all C(C-1)/2 pairs of  -log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2
    (Ouyang et al. 2022, eq. 1: all pairs of a prompt are one batch element; centering: Eisenstein et al.
    2023).
    """
    terms = []
    for better, worse in itertools.combinations(range(scores_BC.shape[-1]), 2):
        r_w, r_l = scores_BC[..., better], scores_BC[..., worse]
        terms.append(-jax.nn.log_sigmoid(r_w - r_l - margin) + centering * jnp.square(r_w + r_l))
    return sum(terms[1:], terms[0]) / len(terms)

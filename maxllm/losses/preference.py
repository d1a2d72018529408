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


def dpo(delta_B: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO's loss of pairs (Rafailov et al. 2023, eq. 7), [B].

    -(1 - s) log sigmoid(beta delta) - s log sigmoid(-beta delta), where s is the share of pairs that are
    thought to be labelled the wrong way round (Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
      delta_B: log(pi / ref) of the chosen completion minus that of the rejected one. Log-probabilities of
        completions are sums over their tokens.
      beta: how dearly departing from the reference is paid for.
      label_smoothing: s.
    """
    right_B, wrong_B = jax.nn.log_sigmoid(beta * delta_B), jax.nn.log_sigmoid(-beta * delta_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B


def ipo(delta_B: jax.Array, beta: float) -> jax.Array:
    """IPO's loss of pairs, (delta - 1 / (2 beta))^2, [B]: a margin to reach and not to pass.

    Azar et al. 2023, eq. 17, with sums over tokens as in `dpo`; TRL divides them by the number of tokens.
    """
    return jnp.square(delta_B - 1 / (2 * beta))

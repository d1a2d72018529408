"""Grouped-query attention with packed documents and a key/value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import Tuning
from maxllm.model import alibi, rope
from maxllm.model.adapters import adapted, prefix
from maxllm.model.attend import attend
from maxllm.model.layers import Matrix, RMSNorm, bias, matmul, matrix
from maxllm.model.visible import Keys


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over G key/value heads shared by H query heads (Ainslie et al. 2023)."""

    config: ModelConfig
    tuning: Tuning | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        keys: Keys,
        cos: jax.Array,
        sin: jax.Array,
        deterministic: bool,
        cache_length: int | None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; with a cache_length, keys and values are kept in the `cache` collection."""
        c = self.config
        B, T, D = x_BTD.shape
        H, G, K = c.n_heads, c.n_kv_heads, c.k_dim
        wq_DHK = matrix(self, c, "wq", (D, H, K), ("embed", "heads", "head_dim"))
        wk_DGK = matrix(self, c, "wk", (D, G, K), ("embed", "kv_heads", "head_dim"))
        wv_DGK = matrix(self, c, "wv", (D, G, K), ("embed", "kv_heads", "head_dim"))
        wo_HKD = matrix(self, c, "wo", (H, K, D), ("heads", "head_dim", "embed"), inputs=2, residual=True)

        q_BTHK, k_BSGK, v_BSGK = self._projected(x_BTD, (wq_DHK, wk_DGK, wv_DGK), deterministic)
        if c.position == "rope":
            q_BTHK, k_BSGK = rope.rotate(q_BTHK, cos, sin), rope.rotate(k_BSGK, cos, sin)
        slopes_H = alibi.slopes(H) if c.position == "alibi" else None
        # Of the three each device has its positions; what is gathered is keys and values, not the wider x.
        q_BTHK, k_BSGK, v_BSGK = (
            nn.with_logical_constraint(a, ("batch", "length", "act_heads", None))
            for a in (q_BTHK, k_BSGK, v_BSGK)
        )
        if cache_length is not None:
            k_BSGK = self._cached("k", k_BSGK, keys.first_slot, cache_length)
            v_BSGK = self._cached("v", v_BSGK, keys.first_slot, cache_length)
        if (pair := prefix(self, self.tuning, (G, K))) is not None:
            k_BSGK, v_BSGK = (
                jnp.concatenate([jnp.broadcast_to(own.astype(a.dtype), (B, *own.shape)), a], axis=1)
                for own, a in zip(pair, (k_BSGK, v_BSGK), strict=True)
            )
            keys = keys.preceded(pair[0].shape[0])
        q_BTHK, k_BSGK = checkpoint_name(q_BTHK, "q"), checkpoint_name(k_BSGK, "k")
        v_BSGK = checkpoint_name(v_BSGK, "v")

        dropped = c.attention_dropout > 0 and not deterministic
        dropout_key = self.make_rng("dropout") if dropped else None
        # One query against a cache is a matrix-vector product; kernels that tile queries have nothing to add.
        # Of all kernels, XLA's alone knows keys that every segment sees.
        tiled = cache_length is None and not self.is_initializing() and not keys.shared
        backend = c.kernel if tiled else "xla"
        o_BTHK = attend(
            backend,
            q_BTHK,
            k_BSGK,
            v_BSGK,
            keys,
            c.sliding_window,
            travelling=keys.shards > 1 and c.context_attention == "ring",
            slopes_H=slopes_H,
            dropout=c.attention_dropout,
            dropout_key=dropout_key,
        )
        o_BTD = o_BTHK.reshape(B, T, H * K)
        y_BTD = matmul(o_BTD, wo_HKD.reshape(H * K, D))
        y_BTD = self._adapted("wo", o_BTD, y_BTD, wo_HKD, ("heads", "embed"), deterministic)
        if c.attention_bias == "qkvo":
            y_BTD += bias(self, "o_bias", (D,), ("embed",)).astype(y_BTD.dtype)
        return y_BTD

    def _projected(
        self, x_BTD: jax.Array, weights: tuple[Matrix, Matrix, Matrix], deterministic: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], with adapters, biases and norms."""
        c = self.config
        H, G, K = c.n_heads, c.n_kv_heads, c.k_dim
        q, k, v = (
            self._adapted(name, x_BTD, matmul(x_BTD, w), w, ("embed", axis), deterministic)
            for name, w, axis in zip(
                ("wq", "wk", "wv"), weights, ("heads", "kv_heads", "kv_heads"), strict=True
            )
        )
        if c.attention_bias != "none":
            q += bias(self, "q_bias", (H, K), ("heads", "head_dim")).astype(q.dtype)
            k += bias(self, "k_bias", (G, K), ("kv_heads", "head_dim")).astype(k.dtype)
            v += bias(self, "v_bias", (G, K), ("kv_heads", "head_dim")).astype(v.dtype)
        if c.qk_norm:
            q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
        return q, k, v

    def _adapted(
        self,
        name: str,
        x_BTD: jax.Array,
        y: jax.Array,
        w: Matrix,
        axes: tuple[str, str],
        deterministic: bool,
    ) -> jax.Array:
        """y with the adapter of the weight `name`, if it has one."""
        return adapted(self, self.tuning, name, x_BTD, y, w, axes, deterministic)

    def _cached(self, name: str, new_BTGK: jax.Array, first_slot: jax.Array, cache_length: int) -> jax.Array:
        """Writes new keys or values at first_slot and returns the whole cache, [B, S, G, K]."""
        B, _, G, K = new_BTGK.shape
        cache = self.variable("cache", name, jnp.zeros, (B, cache_length, G, K), new_BTGK.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new_BTGK, first_slot, axis=1)
        return cache.value

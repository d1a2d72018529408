"""Grouped-query attention with packed documents and a key/value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maxllm.config import LoraConfig, ModelConfig
from maxllm.model import rope
from maxllm.model.adapters import adapted
from maxllm.model.layers import RMSNorm, bias, dtype_of, matmul, weight


def attention_mask(
    query_segments_BT: jax.Array, key_segments_BS: jax.Array, first_slot: jax.Array, window: int | None
) -> jax.Array:
    """[B, T, S] bool: a query sees the keys of its own segment up to its own slot; padding sees nothing.

    Args:
      query_segments_BT: segment ids, 0 is padding.
      key_segments_BS: the same for keys.
      first_slot: index among the keys of the first query (0 without a cache).
      window: how many keys it sees at most, its own included; None for all.
    """
    query_slots_T = first_slot + jnp.arange(query_segments_BT.shape[1])
    key_slots_S = jnp.arange(key_segments_BS.shape[1])
    causal_TS = key_slots_S <= query_slots_T[:, None]
    if window is not None:
        causal_TS &= key_slots_S > query_slots_T[:, None] - window
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return same_BTS & causal_TS & (query_segments_BT != 0)[:, :, None]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over G key/value heads shared by H query heads (Ainslie et al. 2023)."""

    config: ModelConfig
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BTS: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        first_slot: jax.Array,
        deterministic: bool,
        cache_length: int | None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; with a cache_length, keys and values are kept in the `cache` collection."""
        c = self.config
        D, H, G, K = c.d_model, c.n_heads, c.n_kv_heads, c.k_dim
        wq_DHK = weight(self, "wq", (D, H, K), ("embed", "heads", "head_dim"), c.init_std)
        wk_DGK = weight(self, "wk", (D, G, K), ("embed", "kv_heads", "head_dim"), c.init_std)
        wv_DGK = weight(self, "wv", (D, G, K), ("embed", "kv_heads", "head_dim"), c.init_std)
        residual_std = c.init_std / (2 * c.n_layers) ** 0.5
        wo_HKD = weight(self, "wo", (H, K, D), ("heads", "head_dim", "embed"), residual_std)

        q_BTHK = self._adapted("wq", x_BTD, matmul(x_BTD, wq_DHK), ("embed", "heads"), deterministic)
        k_BSGK = self._adapted("wk", x_BTD, matmul(x_BTD, wk_DGK), ("embed", "kv_heads"), deterministic)
        v_BSGK = self._adapted("wv", x_BTD, matmul(x_BTD, wv_DGK), ("embed", "kv_heads"), deterministic)
        if c.attention_bias != "none":
            q_BTHK += bias(self, "q_bias", (H, K), ("heads", "head_dim")).astype(q_BTHK.dtype)
            k_BSGK += bias(self, "k_bias", (G, K), ("kv_heads", "head_dim")).astype(k_BSGK.dtype)
            v_BSGK += bias(self, "v_bias", (G, K), ("kv_heads", "head_dim")).astype(v_BSGK.dtype)
        if c.qk_norm:
            q_BTHK, k_BSGK = RMSNorm(c, name="q_norm")(q_BTHK), RMSNorm(c, name="k_norm")(k_BSGK)
        q_BTHK, k_BSGK = rope.rotate(q_BTHK, cos, sin), rope.rotate(k_BSGK, cos, sin)
        q_BTHK = nn.with_logical_constraint(q_BTHK, ("batch", "length", "act_heads", None))
        if cache_length is not None:
            k_BSGK = self._cached("k", k_BSGK, first_slot, cache_length)
            v_BSGK = self._cached("v", v_BSGK, first_slot, cache_length)

        B, T, _ = x_BTD.shape
        q_BTGQK = q_BTHK.reshape(B, T, G, H // G, K)
        scores_BGQTS = jnp.einsum("btgqk,bsgk->bgqts", q_BTGQK, k_BSGK, preferred_element_type=jnp.float32)
        scores_BGQTS *= K**-0.5
        scores_BGQTS = jnp.where(mask_BTS[:, None, None], scores_BGQTS, jnp.finfo(jnp.float32).min)
        probs_BGQTS = jax.nn.softmax(scores_BGQTS, axis=-1).astype(dtype_of(c))
        probs_BGQTS = nn.Dropout(c.attention_dropout)(probs_BGQTS, deterministic=deterministic)
        o_BTGQK = jnp.einsum("bgqts,bsgk->btgqk", probs_BGQTS, v_BSGK)
        o_BTD = o_BTGQK.reshape(B, T, H * K)
        y_BTD = matmul(o_BTD, wo_HKD.reshape(H * K, D))
        y_BTD = self._adapted("wo", o_BTD, y_BTD, ("heads", "embed"), deterministic)
        if c.attention_bias == "qkvo":
            y_BTD += bias(self, "o_bias", (D,), ("embed",)).astype(y_BTD.dtype)
        return y_BTD

    def _adapted(
        self, name: str, x_BTD: jax.Array, y: jax.Array, axes: tuple[str, str], deterministic: bool
    ) -> jax.Array:
        """y with the adapter of the weight `name`, if it has one."""
        return adapted(self, self.lora, name, x_BTD, y, axes, deterministic)

    def _cached(self, name: str, new_BTGK: jax.Array, first_slot: jax.Array, cache_length: int) -> jax.Array:
        """Writes new keys or values at first_slot and returns the whole cache, [B, S, G, K]."""
        B, _, G, K = new_BTGK.shape
        cache = self.variable("cache", name, jnp.zeros, (B, cache_length, G, K), new_BTGK.dtype)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new_BTGK, first_slot, axis=1)
        return cache.value

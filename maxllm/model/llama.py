"""The LLaMA decoder (Touvron et al. 2023) and its language-model head, as functional Flax Linen.

    model = Llama(config)
    params = model.init(key, tokens_BT, segment_ids_BT, positions_BT)["params"]
    logits_BTV = model.apply({"params": params}, tokens_BT, segment_ids_BT, positions_BT)

Layers are scanned: every parameter of `layers` has a leading axis L.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import Tuning
from maxllm.model import rope
from maxllm.model.adapters import COLLECTION, bottleneck, prompt
from maxllm.model.attention import Attention
from maxllm.model.compressed import COLLECTION as COMPRESSED
from maxllm.model.embedding import lookup, noise
from maxllm.model.layers import RMSNorm, SwiGLU, dtype_of, matmul, weight
from maxllm.model.visible import SHARED, Keys
from maxllm.parallel import context, residual
from maxllm.parallel.pipeline import pipeline, stages_here
from maxllm.records import Params
from maxllm.weights import LAYERS, Kind, Weights

LAYER_INPUT = "layer_input"

STACKED = ("params", "cache", COLLECTION, COMPRESSED, "slots")
"""Collections in which every array of a layer is stacked with those of the others."""


def policy_of(config: ModelConfig) -> Callable[..., Any]:
    """What `remat` keeps of a layer for the backward pass, besides its input."""
    if config.remat == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer_input = (LAYER_INPUT,) if config.remat == "offload" else ()
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=config.keep,
        names_which_can_be_offloaded=(*layer_input, *config.keep_in_host),
        offload_src="device",
        offload_dst="pinned_host",
    )


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

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
    ) -> tuple[jax.Array, None]:
        """[B, T, D] -> [B, T, D], in the (carry, output) form that nn.scan wants."""
        c = self.config
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        dropout = nn.Dropout(c.residual_dropout, deterministic=deterministic)
        h_BTD = residual.collected(RMSNorm(c, name="attention_norm")(x_BTD))
        h_BTD = Attention(c, self.tuning, name="attention")(
            h_BTD, keys, cos, sin, deterministic, cache_length
        )
        h_BTD = bottleneck(self, self.tuning, "attention", residual.summed(h_BTD))
        x_BTD = x_BTD + dropout(h_BTD)
        h_BTD = residual.collected(RMSNorm(c, name="mlp_norm")(x_BTD))
        h_BTD = SwiGLU(c, self.tuning, name="mlp")(h_BTD, deterministic)
        h_BTD = bottleneck(self, self.tuning, "mlp", residual.summed(h_BTD))
        return x_BTD + dropout(h_BTD), None


def layer_class(config: ModelConfig) -> type[Layer]:
    """Layer, with as much of it computed again in the backward pass as `remat` says."""
    if config.remat == "none":
        return Layer
    # Inside a scan XLA cannot undo the recomputation, so its guard against that is not needed.
    return nn.remat(Layer, prevent_cse=False, static_argnums=(5, 6), policy=policy_of(config))


def layer_at(
    config: ModelConfig,
    tuning: Tuning | None,
    keys: Keys,
    cos: jax.Array,
    sin: jax.Array,
    key: jax.Array | None,
) -> Callable[[jax.Array, tuple[jax.Array, Params]], tuple[jax.Array, None]]:
    """(x, (number of a layer, its collections)) -> (x after it, None), as a scan takes it; without a key,
    dropout is off."""
    layer = layer_class(config)(config, tuning, parent=None)

    def one(x_BTD: jax.Array, number_and_weights: tuple[jax.Array, Params]) -> tuple[jax.Array, None]:
        number, weights = number_and_weights
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
        y_BTD, _ = layer.apply(weights, x_BTD, keys, cos, sin, key is None, None, rngs=rngs)
        return y_BTD, None

    return one


class CachedSegments(nn.Module):
    """What all layers' caches share: how many slots are filled, and the segment of each."""

    @nn.compact
    def __call__(self, segment_ids_BT: jax.Array, cache_length: int) -> tuple[jax.Array, jax.Array]:
        """Notes the new keys' segments; returns the slot they go to and all key segments, [B, S]."""
        B, T = segment_ids_BT.shape
        slot = self.variable("cache", "slot", lambda: jnp.int32(0))
        segments = self.variable("cache", "segment_ids", jnp.zeros, (B, cache_length), jnp.int32)
        first_slot = slot.value
        new_BT = segment_ids_BT.astype(jnp.int32)
        segments.value = jax.lax.dynamic_update_slice_in_dim(segments.value, new_BT, first_slot, axis=1)
        slot.value = first_slot + T
        return first_slot, segments.value


class Decoder(nn.Module):
    """Embedding, L layers, final norm: token ids to the hidden states that heads read.

    With `unstacked`, every layer has parameters of its own, `layer_0` and so on; see `unstack`.
    """

    config: ModelConfig
    tuning: Tuning | None = None
    unstacked: bool = False

    def setup(self) -> None:
        """Declares the embedding table, the scanned layers and the final norm."""
        c = self.config
        self.embedding_VD = weight(
            self, "embedding", Kind.TABLE, (c.vocab_size, c.d_model), ("vocab", "table"), c.init_std
        )
        layer = layer_class(c)
        self.prompt_PD = prompt(self, self.tuning, c.d_model)
        self.final_norm = RMSNorm(c)
        self.embedding_dropout = nn.Dropout(c.embedding_dropout)
        self.cached_segments = CachedSegments()
        if self.unstacked:
            self.layer = [layer(c, self.tuning) for _ in range(c.n_layers)]
            return
        self.layers = nn.scan(
            layer,
            variable_axes=dict.fromkeys(STACKED, 0),
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.n_layers,
            unroll=c.scan_unroll,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )(c, self.tuning)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        deterministic: bool = True,
        cache_length: int | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute type.

        Args:
          tokens_BT: int32 ids.
          segment_ids_BT: int32; tokens see their own segment only, 0 is padding.
          positions_BT: int32 positions for the rotary embedding.
          deterministic: False draws dropout masks from the `dropout` rng.
          cache_length: slots of the key/value cache (S); None runs without one. With a cache, apply with
            mutable=["cache"] and feed the returned collection to the next call.
        """
        c = self.config
        shards = 1 if cache_length is not None or self.is_initializing() else context.shards_here()
        tokens_BT, segment_ids_BT, positions_BT = (
            context.balanced(a, shards) for a in (tokens_BT, segment_ids_BT, positions_BT)
        )
        if self.is_initializing():
            x_BTD = jnp.zeros((*tokens_BT.shape, c.d_model), dtype_of(c))
        else:
            x_BTD = lookup(self.embedding_VD, tokens_BT, dtype_of(c))
        if c.embedding_noise and not deterministic:
            added_BTD = noise(self.make_rng("dropout"), x_BTD, segment_ids_BT, c.embedding_noise)
            x_BTD += added_BTD.astype(x_BTD.dtype)
        P = 0 if self.prompt_PD is None else self.prompt_PD.shape[0]
        if P and cache_length is not None:
            cache_length += P
            P = 0 if self.cached_segments.has_variable("cache", "slot") else P  # it is in the cache already
        x_BTD, segment_ids_BT, positions_BT = self._after_prompt(P, x_BTD, segment_ids_BT, positions_BT)
        x_BTD = residual.split(x_BTD)
        x_BTD = self.embedding_dropout(x_BTD, deterministic=deterministic)
        first_slot, key_segments_BS = jnp.int32(0), segment_ids_BT
        if cache_length is not None:
            first_slot, key_segments_BS = self.cached_segments(segment_ids_BT, cache_length)
        keys = Keys(segment_ids_BT, key_segments_BS, first_slot, shards, shared=self.prompt_PD is not None)
        # Held fast: XLA would fuse them into each unrolled layer, and compute every angle there again.
        cos, sin = jax.lax.optimization_barrier(rope.angles(c, positions_BT))
        if "upper" in self.variables:
            x_BTD = self._above_frozen(x_BTD, keys, cos, sin, deterministic)
        elif stages_here() > 1 and cache_length is None and not self.is_initializing():
            x_BTD = self._through_stages(x_BTD, keys, cos, sin, deterministic)
        else:
            for layer in self.layer if self.unstacked else [self.layers]:
                x_BTD, _ = layer(x_BTD, keys, cos, sin, deterministic, cache_length)
        if shards > 1:
            x_BTD = context.unbalanced_shards(x_BTD)
        return self.final_norm(x_BTD[:, P:])

    def _after_prompt(
        self, P: int, x_BTD: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows with the trained prompt in front, if P is not 0, and positions that leave room for it and for
        the trained prefix, where there is one."""
        if self.tuning is None or COLLECTION not in self.variables:
            return x_BTD, segment_ids_BT, positions_BT
        positions_BT = positions_BT + self.tuning.before
        if not P or self.prompt_PD is None:
            return x_BTD, segment_ids_BT, positions_BT
        rows = x_BTD.shape[0], P
        own_BPD = jnp.broadcast_to(self.prompt_PD.astype(x_BTD.dtype), (*rows, x_BTD.shape[2]))
        own_BP = jnp.broadcast_to(jnp.arange(self.tuning.before - P, self.tuning.before), rows)
        pairs = (own_BPD, x_BTD), (jnp.full(rows, SHARED), segment_ids_BT), (own_BP, positions_BT)
        x_BTD, segment_ids_BT, positions_BT = (jnp.concatenate(pair, axis=1) for pair in pairs)
        return x_BTD, segment_ids_BT, positions_BT

    def _above_frozen(
        self, x_BTD: jax.Array, keys: Keys, cos: jax.Array, sin: jax.Array, deterministic: bool
    ) -> jax.Array:
        """All layers where the first k are frozen and those after them are in the `upper` collection."""
        variables = dict(self.layers.variables)
        frozen, upper = variables.pop("params"), variables.pop("upper")
        k = self.config.n_layers - jax.tree.leaves(upper)[0].shape[0]
        key = None if deterministic else self.make_rng("dropout")
        one = layer_at(self.config, self.tuning, keys, cos, sin, key)

        def below(x_BTD: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            # By number, because a slice of the stack would be a copy of it.
            own = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), frozen)
            return one(x_BTD, (number, {"params": own}))

        unroll = self.config.scan_unroll
        x_BTD, _ = jax.lax.scan(below, x_BTD, jnp.arange(k), unroll=min(unroll, k))
        trained = jnp.arange(k, self.config.n_layers), {"params": upper, **variables}
        return jax.lax.scan(one, x_BTD, trained, unroll=unroll)[0]

    def _through_stages(
        self, x_BTD: jax.Array, keys: Keys, cos: jax.Array, sin: jax.Array, deterministic: bool
    ) -> jax.Array:
        """All layers, as `pipeline` runs them."""
        c = self.config

        def block(weights: Params, x_bTD: jax.Array, rows: Any, key: jax.Array | None) -> jax.Array:
            segment_ids_bT, cos, sin = rows
            own = Keys(segment_ids_bT, segment_ids_bT, jnp.int32(0), keys.shards, keys.shared)
            count = jax.tree.leaves(weights)[0].shape[0]
            one = layer_at(c, self.tuning, own, cos, sin, key)
            return jax.lax.scan(one, x_bTD, (jnp.arange(count), weights))[0]

        return pipeline(
            block,
            self.layers.variables,
            x_BTD,
            (keys.query_segments_BT, cos, sin),
            None if deterministic else self.make_rng("dropout"),
            microbatches=c.pipeline_microbatches or stages_here(),
            rounds=c.pipeline_rounds,
        )


class Llama(nn.Module):
    """The decoder with its language-model head; `tuning` is what is trained where that is not all of it."""

    config: ModelConfig
    tuning: Tuning | None = None
    unstacked: bool = False

    def setup(self) -> None:
        """Declares the decoder and, unless tied, the output projection."""
        c = self.config
        self.decoder = Decoder(c, self.tuning, self.unstacked)
        if not c.tie_embeddings:
            self.lm_head_DV = weight(
                self, "lm_head", Kind.TABLE, (c.d_model, c.vocab_size), ("table", "vocab"), c.init_std
            )

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """What the head reads, [B, T, D]: for losses that do not want the logits."""
        return self.decoder(tokens_BT, segment_ids_BT, positions_BT, deterministic)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        deterministic: bool = True,
        cache_length: int | None = None,
        last_only: bool = False,
    ) -> jax.Array:
        """Logits [B, T, V] in float32; the arguments are `Decoder`'s.

        With last_only, logits of the last position alone, [B, 1, V]: what decoding needs.
        """
        x_BTD = self.decoder(tokens_BT, segment_ids_BT, positions_BT, deterministic, cache_length)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        if self.config.tie_embeddings:
            w_VD = self.decoder.embedding_VD.astype(x_BTD.dtype)
            logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD, preferred_element_type=jnp.float32)
        else:
            logits_BTV = matmul(x_BTD, self.lm_head_DV, jnp.dtype(jnp.float32))
        return nn.with_logical_constraint(logits_BTV, ("batch", "length", "act_vocab"))


def head_weight(model: Llama, weights: Weights) -> jax.Array:
    """The output projection, [D, V]."""
    base = weights.base
    return base["decoder"]["embedding"].T if model.config.tie_embeddings else base["lm_head"]


def unstack(weights: Weights, n_layers: int) -> Weights:
    """The weights of an `unstacked` model: each layer's by themselves, instead of stacked on an axis L.

    A scan takes each layer's slice of the stack at every step. XLA's CPU backend copies it, which is nothing
    in training, but in decoding costs more than the matmuls: a step reads every weight once and does little
    else.
    """

    def apart(tree: Params) -> Params:
        decoder = dict(tree["decoder"])
        stacked = decoder.pop(LAYERS, {})  # a prompt alone is in no layer
        for number in range(n_layers):
            decoder[f"layer_{number}"] = jax.tree.map(lambda leaf, n=number: leaf[n], stacked)
        return {**tree, "decoder": decoder}

    adapters = None if weights.adapters is None else apart(weights.adapters)
    return Weights(apart(weights.base), adapters)

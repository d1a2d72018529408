"""The decoder with a scalar head: reward model (read at the last token) and critic (read everywhere)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maxllm.config.model import ModelConfig
from maxllm.config.tuning import Tuning
from maxllm.model.layers import weight
from maxllm.model.llama import Decoder
from maxllm.weights import Kind


class ScalarModel(nn.Module):
    """One float32 number per position. Its `decoder` parameters are those of `Llama`, as are its adapters."""

    config: ModelConfig
    tuning: Tuning | None = None

    def setup(self) -> None:
        """Declares the decoder and the head, N(0, 1 / sqrt(D + 1)) (Stiennon et al. 2020)."""
        c = self.config
        self.decoder = Decoder(c, self.tuning)
        std = (c.d_model + 1) ** -0.5
        self.head_D1 = weight(self, "head", Kind.HEAD, (c.d_model, 1), ("table", "norm"), std)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """Scores or values, [B, T] float32; the arguments are `Decoder`'s."""
        x_BTD = self.decoder(tokens_BT, segment_ids_BT, positions_BT, deterministic)
        return jnp.einsum("btd,do->bto", x_BTD.astype(jnp.float32), self.head_D1)[..., 0]

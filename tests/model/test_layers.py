"""What happens to a weight between its declaration and its matmul."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from maxllm.model.layers import bfloat16_of


def test_rounding_by_bits_is_the_cast():
    """Every exponent, ties, subnormals, infinities; and NaN stays NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], np.float32)
    x = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    got, wanted = np.asarray(bfloat16_of(jnp.asarray(x))), x.astype(ml_dtypes.bfloat16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(got[~nan].view(np.uint16), wanted[~nan].view(np.uint16))
    assert np.isnan(got[nan].astype(np.float32)).all()

"""Values in `config.json` that are no sizes of a model: each is named."""

import math
from typing import Any

import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.model import flops
from mdrl_jax.model.families import from_hf

GOOD: dict[str, Any] = {
    **{"model_type": "qwen2", "vocab_size": 10, "num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 6},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0), ("num_attention_heads", -2), ("hidden_size", math.inf), ("vocab_size", -1),
        ("vocab_size", 1.5), ("num_hidden_layers", True), ("intermediate_size", "6"), ("num_key_value_heads", 0),
        ("max_position_embeddings", -5), ("rope_theta", math.inf), ("rms_norm_eps", -1e-6), ("rms_norm_eps", math.nan),
        ("model_type", ["qwen2"]), ("model_type", None), ("head_dim", -1), ("head_dim", 3), ("layer_types", 5),
    ],
)  # fmt: skip
def test_a_value_that_is_no_size_is_named(field: str, value: Any) -> None:
    from_hf(GOOD)
    with pytest.raises(UserError, match=rf"there: {field}[= ]") as caught:
        from_hf(GOOD | {field: value}, "there")
    assert "\n" not in str(caught.value)


def test_heads_of_odd_size_are_refused_where_they_follow_from_other_sizes() -> None:
    with pytest.raises(UserError, match=r"there: head_dim=3 .*even.*\(hidden_size / num_attention_heads if absent\)"):
        from_hf(GOOD | {"hidden_size": 6}, "there")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", 0), ("factor", -8.0), ("factor", math.nan), ("low_freq_factor", 0.0), ("high_freq_factor", 0),
        ("high_freq_factor", 1.0), ("high_freq_factor", math.inf), ("original_max_position_embeddings", 0),
    ],
)  # fmt: skip
def test_a_rope_scaling_that_cannot_be_computed_is_named(field: str, value: float) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    made = GOOD | {"rope_scaling": {"rope_type": "llama3"} | scaling}
    from_hf(made)
    with pytest.raises(UserError, match=rf"there: {field}=\S+ of the RoPE scaling") as caught:
        from_hf(made | {"rope_scaling": made["rope_scaling"] | {field: value}}, "there")
    assert "\n" not in str(caught.value)


def test_a_null_size_has_its_default() -> None:
    found = from_hf(GOOD | {"head_dim": None, "num_key_value_heads": None, "max_position_embeddings": None})
    assert (found.head_dim, found.n_kv_heads, found.max_positions) == (2, 2, 2048)


def test_operations_of_tokens_by_hand() -> None:
    """A layer: q 4·4, k and v 4·2 each, o 4·4, MLP 3·4·6; then 10·4 of the unembedding. No norms, no biases."""
    config = from_hf(GOOD)
    assert flops.matrix_weights(config) == 2 * (16 + 8 + 8 + 16 + 72) + 40 == 280
    norms, biases = (2 * 2 + 1) * 4, 2 * (4 + 2 + 2)
    assert config.n_params == 280 + norms + biases + 40  # an untied embedding, which is only looked up
    tokens = {"read": 3, "sampled": 5, "forward": 2, "gradient": 1, "trained": 4, "jets": 1}
    assert flops.of_tokens(config, tokens) == 2 * 280 * (3 + 5 + 2 + 3 * 1 + 3 * 4 + 5 * 1)

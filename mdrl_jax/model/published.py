"""Sizes of published models, copied from their public `config.json`.

They serve commands that need the sizes of a model but not its weights, such as `fit`, if there is no model folder.
"""

import dataclasses

from mdrl_jax.errors import UserError
from mdrl_jax.model.families import FAMILIES, ModelConfig, RopeScaling


def _qwen2(n_layers: int, d_model: int, d_mlp: int, n_heads: int, n_kv_heads: int, **other: bool | int) -> ModelConfig:
    config = ModelConfig(
        family="qwen2",
        vocab_size=151936,
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        rope_theta=1e6,
        max_positions=32768,
        **FAMILIES["qwen2"],
    )
    return dataclasses.replace(config, **other)


def _qwen3(n_layers: int, d_model: int, d_mlp: int, n_heads: int, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        tied=tied,
        max_positions=40960,
        **FAMILIES["qwen3"],
    )


def _llama(n_layers: int, d_model: int, n_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=8192,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=head_dim,
        rope_theta=5e5,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, original_max_position=8192),
        norm_eps=1e-5,
        max_positions=131072,
    )


_SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    n_layers=30,
    d_model=576,
    d_mlp=1536,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied=True,
    max_positions=8192,
)
_QWEN3_4B = _qwen3(36, 2560, 9728, 32)
_ALONE = {
    "Qwen2.5-0.5B": _qwen2(24, 896, 4864, 14, 2),
    "Qwen2.5-1.5B": _qwen2(28, 1536, 8960, 12, 2),
    "Qwen2.5-3B": _qwen2(36, 2048, 11008, 16, 2),
    "Qwen2.5-7B": _qwen2(28, 3584, 18944, 28, 4, vocab_size=152064, tied=False),
    "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16),
    "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16),
    "Qwen3-4B": _QWEN3_4B,
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
    "Qwen3-4B-Thinking-2507": dataclasses.replace(_QWEN3_4B, rope_theta=5e6, max_positions=262144),
    "Llama-3.2-1B": _llama(16, 2048, 32, 64),
    "Llama-3.2-3B": _llama(28, 3072, 24, 128),
    "SmolLM2-135M": _SMOLLM2_135M,
}
# An instruct model has the sizes of its base model.
_INSTRUCT = {f"{name}-Instruct": c for name, c in _ALONE.items() if name.startswith(("Qwen2.5", "Llama", "SmolLM2"))}
PUBLISHED: dict[str, ModelConfig] = {**_ALONE, **_INSTRUCT}


def sizes(path: str) -> ModelConfig:
    """The sizes of the published model that the last part of a path names.

    Args:
      path: the model's name, perhaps after other parts, e.g. `Qwen2.5-3B` or `Qwen/Qwen2.5-3B`. The other parts are
        not checked, and slashes at the end are ignored; upper and lower case count.

    Raises:
      UserError: if no known model has this name; the message lists the known ones.
    """
    name = path.rstrip("/").rpartition("/")[2]
    if name not in PUBLISHED:
        raise UserError(
            f"model.path={path!r} is neither a folder nor a published model whose sizes are known; known: "
            f"{', '.join(PUBLISHED)}"
        )
    return PUBLISHED[name]

"""The sizes and options of Llama, Qwen2/2.5 and Qwen3 as one `ModelConfig`, read from and written to `config.json`.

Some fields of `config.json` ask for a function that the decoder does not compute: a sliding window, experts, another
activation, another RoPE scaling. `from_hf` refuses a model with such a field and names the field.
"""

import dataclasses
import math
from typing import Any

from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of RoPE frequencies (`rope_type` "llama3" of Hugging Face).

    The fields have the names of `config.json`, but `original_max_position` is `original_max_position_embeddings` there.

    Attributes:
      factor: what the frequencies of long wavelengths are divided by.
      low_freq_factor: wavelengths above `original_max_position` / `low_freq_factor` are long.
      high_freq_factor: wavelengths below `original_max_position` / `high_freq_factor` are short; they stay.
      original_max_position: longest sequence before the scaling, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder (dimension key in definitions §1) and the few options in which the families differ.

    Attributes:
      family: a key of `FAMILIES`, which is `model_type` in `config.json`.
      vocab_size: V.
      n_layers: L.
      d_model: D.
      d_mlp: F.
      n_heads: H.
      n_kv_heads: K.
      head_dim: h.
      rope_theta: the base of the RoPE frequencies.
      rope_scaling: scaling of the RoPE frequencies; None: none.
      norm_eps: added to the mean square in RMSNorm.
      tied: whether the unembedding is the transposed embedding.
      qkv_bias: whether the q, k and v projections have a bias.
      qk_norm: whether q and k are normalised per head.
      max_positions: longest sequence that the model was made for, in tokens.
    """

    family: str
    vocab_size: int
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        heads = self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        bias = self.head_dim * (self.n_heads + 2 * self.n_kv_heads) if self.qkv_bias else 0
        norms = 2 * self.d_model + (2 * self.head_dim if self.qk_norm else 0)
        layer = self.d_model * (heads + 3 * self.d_mlp) + bias + norms
        embeddings = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return self.n_layers * layer + embeddings + self.d_model


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# The values that transformers uses for fields absent from `config.json`, where they differ between families.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes rope_parameters; transformers 4 wrote rope_theta and rope_scaling.
    parameters = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, llama3")
    scaling = RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position=int(parameters["original_max_position_embeddings"]),
    )
    for field, value, low in (
        ("factor", scaling.factor, 0),
        ("low_freq_factor", scaling.low_freq_factor, 0),
        ("high_freq_factor", scaling.high_freq_factor, scaling.low_freq_factor),
        ("original_max_position_embeddings", scaling.original_max_position, 0),
    ):
        if not low < value < math.inf:
            raise UserError(f"{where}: {field}={value} of the RoPE scaling is not valid; it must be above {low:g}")
    return theta, scaling


def from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`.

    Args:
      hf: the fields of `config.json`. An absent field has the value that `transformers` gives it, if it gives one.
        Fields that this module does not know are ignored.
      where: the name of the file in error messages.

    Raises:
      UserError: if a field asks for something that the decoder does not compute, is absent although it has no default,
        has a wrong type or is no size of a model (a size below 1, a number that is not finite, an odd `head_dim`), if
        the RoPE scaling cannot be computed (a number that is not above 0, or a `high_freq_factor` that is not above
        `low_freq_factor`), or if the heads are not a multiple of the key heads; the message names the file, and the
        field where it is known.
      KeyError: if a family of `FAMILIES` has no entry in `DEFAULTS`.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type {family!r} is not supported; supported: {known}")
    hf = {**DEFAULTS[family], **hf}
    layers = hf.get("layer_types") or []
    refused = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "use_sliding_window": bool(hf.get("use_sliding_window", False)),
        "layer_types": not isinstance(layers, list) or any(kind != "full_attention" for kind in layers),
        "num_experts": bool(hf.get("num_experts", 0)),
        "quantization_config": hf.get("quantization_config") is not None,
        "attention_dropout": bool(hf.get("attention_dropout", 0.0)),
    }
    if family not in ("qwen2", "qwen3"):  # these families set `sliding_window` also where `use_sliding_window` is false
        refused["sliding_window"] = hf.get("sliding_window") is not None
    for field, bad in refused.items():
        if bad:
            raise UserError(f"{where}: {field}={hf[field]!r} is not supported by this decoder")

    def size(field: str, default: int | None = None) -> int:
        """A whole number of at least 1; a field that is absent or null has the default, if there is one."""
        value = default if default is not None and hf.get(field) is None else hf[field]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: {field}={value!r} is not valid; it must be a whole number of at least 1")
        return value

    try:
        theta, scaling = _rope(hf, where)
        d_model, n_heads = size("hidden_size"), size("num_attention_heads")
        config = ModelConfig(
            family=family,
            vocab_size=size("vocab_size"),
            n_layers=size("num_hidden_layers"),
            d_model=d_model,
            d_mlp=size("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=size("num_key_value_heads", n_heads),
            head_dim=size("head_dim", d_model // n_heads),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tied=bool(hf.get("tie_word_embeddings", False)),
            max_positions=size("max_position_embeddings", 2048),
            **FAMILIES[family],
        )
    except KeyError as e:
        raise UserError(f"{where}: field {e.args[0]!r} is missing") from e
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: a field has a value of the wrong type ({e})") from e
    for field, value in (("rope_theta", config.rope_theta), ("rms_norm_eps", config.norm_eps)):
        if not 0 < value < math.inf:
            raise UserError(f"{where}: {field}={value} is not valid; it must be a number above 0")
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads={config.n_heads} is not a multiple of "
            f"num_key_value_heads={config.n_kv_heads}"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{where}: head_dim={config.head_dim} is not valid; it must be even "
            "(hidden_size / num_attention_heads if absent)"
        )
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` with which `transformers` (4 and 5) loads the same function.

    Args:
      config: the model, which is not checked; `qkv_bias` and `qk_norm` have to be those of its family (`FAMILIES`).

    Returns:
      field name -> JSON value, with `torch_dtype` "float32"; `from_hf` turns them into an equal `ModelConfig`.

    Raises:
      KeyError: if the family is not a key of `ARCHITECTURES`.
    """
    scaling = config.rope_scaling
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "torch_dtype": "float32",
    }

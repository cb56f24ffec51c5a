"""The sizes and options of every model family as one `ModelConfig`, read from and written to `config.json`.

The families are those of `FAMILIES`: Llama, Mistral, Qwen2/2.5, Qwen3, OLMo 2, SmolLM3 and the text models of Gemma 3.
Each is its difference to Llama. Some fields of `config.json` ask for a function that the decoder does not compute:
experts, soft-capped logits, another activation, another RoPE scaling. `from_hf` refuses a model with such a field and
names the field.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 or linear scaling of RoPE frequencies (`rope_type` "llama3" and "linear" of Hugging Face).

    Linear scaling divides all frequencies by `factor`; the other fields are then 0. The fields have the names of
    `config.json`, but `original_max_position` is `original_max_position_embeddings` there.

    Attributes:
      factor: what the frequencies of long wavelengths are divided by.
      low_freq_factor: wavelengths above `original_max_position` / `low_freq_factor` are long.
      high_freq_factor: wavelengths below `original_max_position` / `high_freq_factor` are short; they stay.
      original_max_position: longest sequence before the scaling, in tokens.
    """

    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position: int = 0

    @property
    def linear(self) -> bool:
        """Whether all frequencies are divided by `factor`."""
        return not self.original_max_position


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
      qk_norm_joint: whether the heads of q, and those of k, are normalised together; only with `qk_norm`.
      pre_norm: whether the inputs of attention and MLP are normalised.
      post_norm: whether the outputs of attention and MLP are normalised before they are added to the residual stream.
      norm_offset: what is added to the scale of every norm.
      activation: activation of the MLP, a key of `transformer.ACTIVATIONS`.
      scaled_embedding: whether embedded tokens are multiplied by √D.
      query_scalar: attention scores are q·k / √query_scalar; 0 stands for h.
      window: in a sliding layer, a token attends to itself and the `window` − 1 tokens before it; 0 if none slides.
      sliding: for each layer, whether it slides; a shorter tuple is repeated, and () means that no layer slides.
      local_theta: the base of the RoPE frequencies of sliding layers, which are not scaled; 0: as in other layers.
      no_rope: for each layer, whether it leaves RoPE out; a shorter tuple is repeated, and () means that none does.
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
    qk_norm_joint: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    scaled_embedding: bool = False
    query_scalar: float = 0.0
    window: int = 0
    sliding: tuple[bool, ...] = ()
    local_theta: float = 0.0
    no_rope: tuple[bool, ...] = ()
    max_positions: int = 2048

    def slides(self, layer: int) -> bool:
        """Whether the layer with this index, from 0, slides."""
        return bool(self.sliding) and self.sliding[layer % len(self.sliding)]

    def rotates(self, layer: int) -> bool:
        """Whether the layer with this index, from 0, uses RoPE."""
        return not (self.no_rope and self.no_rope[layer % len(self.no_rope)])

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        heads = self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        bias = self.head_dim * (self.n_heads + 2 * self.n_kv_heads) if self.qkv_bias else 0
        per_head = self.n_heads + self.n_kv_heads if self.qk_norm_joint else 2
        norms = 2 * self.d_model * (self.pre_norm + self.post_norm) + (per_head * self.head_dim if self.qk_norm else 0)
        layer = self.d_model * (heads + 3 * self.d_mlp) + bias + norms
        embeddings = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return self.n_layers * layer + embeddings + self.d_model


# A family's difference to Llama.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "olmo2": {"qk_norm": True, "qk_norm_joint": True, "pre_norm": False, "post_norm": True},
    "smollm3": {},
    "gemma3_text": {
        "qk_norm": True,
        "post_norm": True,
        "norm_offset": 1.0,
        "activation": "gelu_pytorch_tanh",
        "scaled_embedding": True,
    },
}
# The values that transformers uses for fields absent from `config.json`, where they differ between families.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096},
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
SLIDERS = ("mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")  # families whose layers may slide (`_layers`)
FULL, SLIDING = "full_attention", "sliding_attention"  # the kinds of layers in `layer_types`
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of the number of experts


def _rope(hf: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes rope_parameters; transformers 4 wrote rope_theta and rope_scaling.
    parameters = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("llama3", "linear"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, llama3, linear")
    if kind == "linear":
        scaling = RopeScaling(factor=float(parameters["factor"]))
        checked: tuple[tuple[str, float, float], ...] = (("factor", scaling.factor, 0),)
    else:
        scaling = RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position=int(parameters["original_max_position_embeddings"]),
        )
        checked = (
            ("factor", scaling.factor, 0),
            ("low_freq_factor", scaling.low_freq_factor, 0),
            ("high_freq_factor", scaling.high_freq_factor, scaling.low_freq_factor),
            ("original_max_position_embeddings", scaling.original_max_position, 0),
        )
    for field, value, low in checked:
        if not low < value < math.inf:
            raise UserError(f"{where}: {field}={value} of the RoPE scaling is not valid; it must be above {low:g}")
    return theta, scaling


def _by_kind(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Gemma 3 with its RoPE parameters, which version 5 has by kind of layer, as fields of their own."""
    parameters = hf.get("rope_parameters") or {}
    if not {FULL, SLIDING} & set(parameters):
        return hf
    local = parameters.get(SLIDING) or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters of sliding layers have the type {local['rope_type']!r}, not default")
    named = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    return {**hf, "rope_parameters": parameters.get(FULL), **named}


def _layers(hf: dict[str, Any], family: str, n_layers: int, longest: int, where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` in which layers differ, as `transformers` decides them for each family.

    A window of at least `longest` tokens never cuts anything off, so then no layer slides.
    """
    kinds = hf.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or len(kinds) != n_layers or not set(map(str, kinds)) <= {FULL, SLIDING}
    ):
        raise UserError(f"{where}: layer_types={kinds!r} is not supported; it must name {FULL} or {SLIDING} per layer")
    no_rope = ()
    if family == "smollm3":
        interval = hf.get("no_rope_layer_interval") or 4
        uses = hf.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n_layers)]
        if len(uses) < n_layers:
            raise UserError(f"{where}: no_rope_layers has {len(uses)} entries for {n_layers} layers")
        no_rope = tuple(not use for use in uses[:n_layers])
    window = hf.get("sliding_window")
    if family not in SLIDERS:
        default, window = [FULL] * n_layers, None
    elif family == "mistral":
        default, kinds = [FULL if window is None else SLIDING] * n_layers, None  # transformers ignores layer_types
    elif family == "gemma3_text":
        pattern = hf.get("sliding_window_pattern") or 6
        default = [SLIDING if (i + 1) % pattern else FULL for i in range(n_layers)]
    else:
        used = hf.get("use_sliding_window", False)
        if used not in (True, False, None):
            raise UserError(f"{where}: use_sliding_window={used!r} is not valid; it must be true or false")
        window = window if used else None
        late = no_rope if family == "smollm3" else [i >= hf.get("max_window_layers", 28) for i in range(n_layers)]
        default = [SLIDING if window is not None and slides else FULL for slides in late]
    sliding = tuple(kind == SLIDING for kind in (default if kinds is None else kinds))
    if any(sliding) and window is None:
        which = "no sliding_window" if hf.get("sliding_window") is None else "use_sliding_window=False"
        raise UserError(f"{where}: layer_types has {SLIDING}, but the model has {which}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise UserError(f"{where}: sliding_window={window!r} is not valid; it must be a whole number of at least 1")
    cuts = any(sliding) and window is not None and window < longest
    # Sliding layers of Gemma 3 have a RoPE of their own, so they remain layers of this kind if nothing is cut off.
    own_rope = any(sliding) and family == "gemma3_text"
    found: dict[str, Any] = {"no_rope": no_rope if any(no_rope) else ()}
    if cuts or own_rope:
        found |= {"window": window, "sliding": sliding}
    if own_rope:
        found["local_theta"] = float(hf["rope_local_base_freq"])
    return found


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
    if hf.get("model_type") == "gemma3" and isinstance(hf.get("text_config"), dict):  # a model of images and text
        hf = {"tie_word_embeddings": hf.get("tie_word_embeddings", True), **hf["text_config"]}
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        experts = any(hf.get(field) for field in EXPERTS) or "moe" in str(family)
        why = "is a mixture of experts, which this decoder does not compute" if experts else "is not supported"
        raise UserError(f"{where}: model_type {family!r} {why}; supported: {', '.join(FAMILIES)}")
    hf = {**DEFAULTS[family], **hf}
    activation = FAMILIES[family].get("activation", "silu")
    named = "hidden_activation" if family == "gemma3_text" else "hidden_act"
    refused = {
        named: hf.get(named, activation) != activation,
        "attention_bias": bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        **{field: bool(hf.get(field, 0)) for field in EXPERTS},
        "quantization_config": hf.get("quantization_config") is not None,
        "attention_dropout": bool(hf.get("attention_dropout", 0.0)),
        "clip_qkv": hf.get("clip_qkv") is not None,
        "final_logit_softcapping": hf.get("final_logit_softcapping") is not None,
        "attn_logit_softcapping": hf.get("attn_logit_softcapping") is not None,
        "use_bidirectional_attention": bool(hf.get("use_bidirectional_attention", False)),
    }
    if family not in SLIDERS:
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
        hf = _by_kind(hf)
        theta, scaling = _rope(hf, where)
        n_layers, longest = size("num_hidden_layers"), size("max_position_embeddings", 2048)
        d_model, n_heads = size("hidden_size"), size("num_attention_heads")
        config = ModelConfig(
            family=family,
            vocab_size=size("vocab_size"),
            n_layers=n_layers,
            d_model=d_model,
            d_mlp=size("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=size("num_key_value_heads", n_heads),
            head_dim=size("head_dim", d_model // n_heads),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tied=bool(hf.get("tie_word_embeddings", False)),
            query_scalar=float(size("query_pre_attn_scalar")) if family == "gemma3_text" else 0.0,
            max_positions=longest,
            **_layers(hf, family, n_layers, longest, where),
            **FAMILIES[family],
        )
    except KeyError as e:
        raise UserError(f"{where}: field {e.args[0]!r} is missing") from e
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: a field has a value of the wrong type ({e})") from e
    for field, value in (
        ("rope_theta", config.rope_theta),
        ("rms_norm_eps", config.norm_eps),
        *([("rope_local_base_freq", config.local_theta)] if config.local_theta else []),
    ):
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
      config: the model, which is not checked; the fields that `FAMILIES` sets for its family must have those values.

    Returns:
      field name -> JSON value, with `torch_dtype` "float32"; `from_hf` turns them into an equal `ModelConfig`.

    Raises:
      KeyError: if the family is not a key of `ARCHITECTURES`.
    """
    scaling, layers = config.rope_scaling, range(config.n_layers)
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
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _scaling(scaling),
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        **_own_fields(config, [SLIDING if config.slides(i) else FULL for i in layers]),
        "torch_dtype": "float32",
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.linear:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _own_fields(config: ModelConfig, kinds: list[str]) -> Mapping[str, Any]:
    """Fields that only some families have."""
    slides = SLIDING in kinds
    if config.family == "mistral":
        return {"sliding_window": config.window if slides else None}
    if config.family == "gemma3_text":
        return {
            "hidden_activation": config.activation,
            "query_pre_attn_scalar": int(config.query_scalar),  # transformers refuses other numbers
            "sliding_window": config.window or config.max_positions,
            "layer_types": kinds,
            "rope_local_base_freq": config.local_theta or config.rope_theta,
        }
    own: dict[str, Any] = {}
    if config.family == "smollm3":
        own["no_rope_layers"] = [int(config.rotates(i)) for i in range(config.n_layers)]
    if slides:
        own |= {"use_sliding_window": True, "sliding_window": config.window, "layer_types": kinds}
    return own

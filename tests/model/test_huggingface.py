"""The Hugging Face layout against torch `transformers`, both ways, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface
from mdrl_jax.model.families import ARCHITECTURES, FAMILIES, from_hf, to_hf
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh

torch = pytest.importorskip("torch", reason="the oracle is torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fast_compile")

LENGTHS = (9, 4, 1)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 1e6}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # the defaults are beyond the vocabulary
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-scaled-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 12, "rope_parameters": THETA}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 4, "num_key_value_heads": 1}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "olmo2": ("Olmo2", NO_TOKENS),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, **NO_TOKENS}),
    "gemma3": (
        "Gemma3Text",
        {
            **{"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 6, "sliding_window_pattern": 2},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}
ORACLES = {"Gemma3Text": "Gemma3"}  # names of models that differ from those of their configurations


@pytest.fixture(scope="module")
def mesh1():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def torch_model(case):
    """A random torch model in which every parameter, norms and biases too, matters to the logits."""
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{ORACLES.get(family, family)}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def batch(vocab):
    """Left-padded tokens; longer than the RoPE scaling's short wavelengths."""
    width = 40
    tokens_BT = np.random.default_rng(0).integers(0, vocab, (len(LENGTHS), width)).astype(np.int32)
    valid_BT = np.arange(width)[None] >= np.array([0, 3, 38])[:, None]
    return tokens_BT, valid_BT


def torch_logits(model, tokens_BT, valid_BT):
    positions = np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            torch.tensor(tokens_BT, dtype=torch.long),
            attention_mask=torch.tensor(valid_BT, dtype=torch.long),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


def assert_same_logits(folder, oracle, mesh, tolerance=1e-4):
    model = Decoder(huggingface.read_config(folder))
    params = huggingface.load(folder, model, mesh)
    tokens_BT, valid_BT = batch(model.config.vocab_size)
    ours = jax.jit(model.apply)({"params": params}, tokens_BT, valid_BT)
    theirs = torch_logits(oracle, tokens_BT, valid_BT)
    np.testing.assert_allclose(np.asarray(ours)[valid_BT], theirs[valid_BT], atol=tolerance, rtol=0)
    assert theirs[valid_BT].std() > 0.3  # the comparison is of something


def assert_trees_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_torch(case, tmp_path, mesh1):
    oracle = torch_model(case)
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_logits(tmp_path, oracle, mesh1)
    config = huggingface.read_config(tmp_path)
    assert from_hf(to_hf(config)) == config


def test_logits_of_a_real_model_equal_torch(shared, mesh1):
    folder = shared / "models" / "tinystories-656k"
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_logits(folder, oracle, mesh1)


def test_tensors_of_our_file_load_in_torch(tiny, tmp_path, monkeypatch):
    """The way back, in one file and in several, and bit-exact through our own reader."""
    for name, limit in [("one", huggingface.SHARD_BYTES), ("several", 20_000)]:
        monkeypatch.setattr(huggingface, "SHARD_BYTES", limit)
        folder = tmp_path / name
        huggingface.save(folder, tiny.params, tiny.config)
        assert (folder / "model.safetensors").exists() == (name == "one")
        assert huggingface.read_config(folder) == tiny.config
        assert_trees_equal(huggingface.load(folder, tiny.model, tiny.mesh), tiny.params)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["one", "several"][: 1 + (name == "several")])
    oracle, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert oracle.num_parameters() == tiny.config.n_params
    tokens_BT, valid_BT = batch(tiny.config.vocab_size)
    ours = np.asarray(jax.jit(tiny.model.apply)({"params": tiny.params}, tokens_BT, valid_BT))
    theirs = torch_logits(oracle, tokens_BT, valid_BT)
    np.testing.assert_allclose(ours[valid_BT], theirs[valid_BT], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_file_becomes_float32(tiny, tmp_path, dtype):
    huggingface.save(tmp_path / "half", tiny.params, tiny.config, jnp.dtype(dtype))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype
    cast = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), tiny.params)
    assert_trees_equal(huggingface.load(tmp_path / "half", tiny.model, tiny.mesh), cast)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    embedding = theirs.get_input_embeddings().weight.float().detach().numpy()
    np.testing.assert_array_equal(embedding, cast["embedding"])


def test_sharded_load_equals_unsharded(tiny, tmp_path, mesh8):
    huggingface.save(tmp_path / "model", tiny.params, tiny.config)
    params = huggingface.load(tmp_path / "model", tiny.model, mesh8)
    assert params["layers"]["q"]["kernel"].addressable_shards[0].data.shape[1:3] == (16, 2)
    assert_trees_equal(params, tiny.params)
    huggingface.save(tmp_path / "again", params, tiny.config)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def test_tied_model_that_stores_only_the_unembedding(tiny_models, tmp_path):
    tiny = tiny_models["qwen2"]
    huggingface.save(tmp_path / "model", tiny.params, tiny.config)
    rewrite(tmp_path / "model", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    rewrite(tmp_path / "model", lambda t: {k: v for k, v in t.items() if "embed_tokens" not in k})
    assert_trees_equal(huggingface.load(tmp_path / "model", tiny.model, tiny.mesh), tiny.params)


def test_config_survives_both_versions_of_transformers(tiny):
    """Version 5 puts RoPE in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    four = to_hf(tiny.config)
    five = dict(four)
    scaling = five.pop("rope_scaling") or {"rope_type": "default"}
    five["rope_parameters"] = {**scaling, "rope_theta": five.pop("rope_theta")}
    assert from_hf(four) == from_hf(five) == tiny.config


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_left_out_have_the_defaults_of_transformers(family):
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = {**{k: SIZES[k] for k in required}, "num_attention_heads": 32, "hidden_size": 1024}
    config = from_hf({"model_type": family, **sizes})
    name = ARCHITECTURES[family].removesuffix("ForCausalLM").replace("Gemma3", "Gemma3Text")
    theirs = getattr(transformers, f"{name}Config")(**sizes)
    assert config.n_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 32)
    assert config.norm_eps == theirs.rms_norm_eps
    rope = theirs.rope_parameters
    assert config.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert config.local_theta == (rope["sliding_attention"]["rope_theta"] if family == "gemma3_text" else 0.0)
    slides = getattr(theirs, "layer_types", None) or ["full_attention"] * 2
    slides = ["sliding_attention"] * 2 if family == "mistral" else slides
    assert [config.slides(i) for i in range(2)] == [kind == "sliding_attention" for kind in slides]
    assert not any(slides) or config.window == (theirs.sliding_window if config.sliding else 0)
    assert config.tied == theirs.tie_word_embeddings
    assert config.max_positions == theirs.max_position_embeddings


def refusal(call, *args):
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"model_type": "mamba"}, ["model_type", "mamba", "qwen3"]),
        ("llama", {"model_type": None}, ["model_type", "None"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("llama", {"sliding_window": 128}, ["sliding_window", "128"]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, ["sliding_window", "0"]),
        ("qwen2", {"use_sliding_window": "yes", "sliding_window": 4}, ["use_sliding_window", "yes", "true or false"]),
        ("qwen2", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}, ["use_sliding_window=False"]),
        ("qwen3", {"layer_types": LAYERS}, ["layer_types", "sliding_attention"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias"]),
        ("llama", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3", {"num_experts": 8}, ["num_experts", "8"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope", "yarn", "llama3"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.0}}, ["factor=0.0", "RoPE"]),
        ("qwen3", {"model_type": "qwen3_moe"}, ["qwen3_moe", "mixture of experts"]),
        ("llama", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, ["rope", "dynamic"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor", "missing"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ("llama", {"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ("llama", {"vocab_size": None}, ["vocab_size", "None"]),
        ("llama", {"rope_scaling": "llama3"}, ["wrong type"]),
    ],
)
def test_unsupported_config_is_refused_by_name(family, change, words, tiny_models):
    supported = to_hf(tiny_models[family].config)
    from_hf(supported)
    message = refusal(from_hf, {**supported, **change}, "some/config.json")
    assert all(word in message for word in ["some/config.json", *words])


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_missing_field_is_named(tiny_models, field):
    hf = to_hf(tiny_models["llama"].config)
    del hf[field]
    assert repr(field) in refusal(from_hf, hf)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in refusal(huggingface.read_config, tmp_path)


def test_missing_folder_and_missing_files_are_refused(tiny_models, tmp_path):
    tiny = tiny_models["llama"]
    assert "does not exist" in refusal(huggingface.read_config, tmp_path / "nowhere")
    assert "no config.json" in refusal(huggingface.read_config, tmp_path)
    assert "model.safetensors" in refusal(huggingface.load, tmp_path, tiny.model, tiny.mesh)


def rewrite(folder, change):
    """Replaces the tensors of a one-file folder by `change(tensors)`."""
    from safetensors.numpy import load_file, save_file

    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")


def without(tensors):
    return {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}


def transposed(tensors):  # as many elements, in another shape
    return {k: v.T if k == "model.layers.1.mlp.up_proj.weight" else v for k, v in tensors.items()}


def as_integers(tensors):
    return {k: v.astype(np.int8) if k == "model.layers.1.mlp.up_proj.weight" else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [(without, "no tensor"), (transposed, "shape [32, 48]; config.json's sizes give [48, 32]"), (as_integers, "I8")],
)
def test_wrong_tensors_are_refused_by_name(tiny_models, tmp_path, change, words):
    tiny = tiny_models["llama"]
    huggingface.save(tmp_path / "model", tiny.params, tiny.config)
    rewrite(tmp_path / "model", change)
    message = refusal(huggingface.load, tmp_path / "model", tiny.model, tiny.mesh)
    assert "model.layers.1.mlp.up_proj.weight" in message and words in message


def test_damaged_weights_are_refused(tiny_models, tmp_path, monkeypatch):
    tiny = tiny_models["llama"]
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    sound = tmp_path / "sound"
    huggingface.save(sound, tiny.params, tiny.config)
    shards = sorted(sound.glob("*.safetensors"))
    index = "model.safetensors.index.json"

    def broken(name, damage):
        folder = tmp_path / name
        shutil.copytree(sound, folder)
        damage(folder)
        return refusal(huggingface.load, folder, tiny.model, tiny.mesh)

    shard = shards[0].name
    cut = lambda f: (f / shard).write_bytes((f / shard).read_bytes()[:-50])  # noqa: E731
    assert "cannot be read" in broken("cut", cut)
    assert "cannot be read" in broken("junk", lambda f: (f / shard).write_bytes(b"junk" * 9))
    assert "cannot be read" in broken("empty", lambda f: (f / shard).write_bytes(b""))
    assert shard in broken("absent", lambda f: (f / shard).unlink())
    for i, text in enumerate(["{", "[]", "{}", '{"weight_map": ["a"]}']):
        assert "cannot be read" in broken(f"index{i}", lambda f, t=text: (f / index).write_text(t))


def test_save_leaves_a_folder_with_content_alone(tiny_models, tmp_path):
    tiny = tiny_models["llama"]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    assert "not empty" in refusal(huggingface.save, kept, tiny.params, tiny.config)
    assert [p.name for p in tmp_path.rglob("*")] == ["kept", "notes.txt"]
    assert (kept / "notes.txt").read_text() == "mine"
    assert "is a file" in refusal(huggingface.save, kept / "notes.txt", tiny.params, tiny.config)
    (tmp_path / "empty").mkdir()
    huggingface.save(tmp_path / "empty", tiny.params, tiny.config)
    assert huggingface.read_config(tmp_path / "empty") == tiny.config


def test_save_into_the_present_folder_and_through_a_link(tiny_models, tmp_path, monkeypatch):
    tiny = tiny_models["llama"]
    (tmp_path / "here").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "link"):
        huggingface.save(folder, tiny.params, tiny.config)
        assert huggingface.read_config(folder) == tiny.config
        assert_trees_equal(huggingface.load(folder, tiny.model, tiny.mesh), tiny.params)
    assert (tmp_path / "link").is_symlink() and huggingface.read_config(tmp_path / "target") == tiny.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link", "target"]

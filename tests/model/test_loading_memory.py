"""Reading a checkpoint takes little more host memory than its parameters (a process of its own measures it)."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.test_experiment import ROOT, environment

SIZES = {"vocab_size": 32000, "num_hidden_layers": 20, "hidden_size": 1024, "intermediate_size": 2816}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
MEASURE = """
import sys, threading, time
import jax
from mdrl_jax.model import huggingface
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

parts = int(sys.argv[2])
mesh = make_mesh(MeshConfig(fsdp=parts), jax.devices()[:parts])
model = Decoder(huggingface.read_config(sys.argv[1]))
jax.numpy.zeros(3).block_until_ready()
before, seen, done = resident(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        seen[0] = max(seen[0], resident())

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(huggingface.load(sys.argv[1], model, mesh))
done.set()
watcher.join()
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(size, (seen[0] - before) / size)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, int]:
    """A bfloat16 checkpoint in 21 files that takes 1 GB as float32, and how many parameters it has."""
    folder = tmp_path_factory.mktemp("large")
    d, f, kv = SIZES["hidden_size"], SIZES["intermediate_size"], 4 * HEADS["head_dim"]
    shapes = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    shapes |= {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    shapes |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    rng, where, n = np.random.default_rng(0), {}, 0
    groups = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        for i in range(SIZES["num_hidden_layers"])
    ]
    groups.append({"model.embed_tokens.weight": (SIZES["vocab_size"], d), "model.norm.weight": (d,)})
    drawn = {s: rng.standard_normal(s, dtype=np.float32).astype(ml_dtypes.bfloat16) for g in groups for s in g.values()}
    for i, group in enumerate(groups):
        tensors = {name: drawn[shape] for name, shape in group.items()}
        save_file(tensors, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(group, f"model-{i}.safetensors")
        n += sum(x.size for x in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {"model_type": "llama", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, **SIZES, **HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, n


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("parts", [1, 4])
def test_the_peak_is_at_most_1_3_times_the_parameters(checkpoint: tuple[Path, int], parts: int) -> None:
    folder, n = checkpoint
    env = environment() | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(parts), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(folder), str(parts)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    size, ratio = done.stdout.split()
    assert int(size) == 4 * n > 1e9
    assert 1.0 <= float(ratio) <= 1.3

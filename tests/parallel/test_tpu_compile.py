"""The device programs, compiled for a slice of 16 TPU v5e by the real compiler, without a TPU.

Run as a script (libtpu wants its environment before JAX starts, so in a process of its own), this file compiles
them for one mesh and prints what the tests judge, as JSON.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import topologies

from mdrl_jax.model import attention, flops
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.fit import compile_for, whole_parameters
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named, over_tensor, param_shardings
from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig
from mdrl_jax.rl.policy import PolicyBatch, make_grpo_loss
from mdrl_jax.rl.rollout import make_sampler
from mdrl_jax.rl.sampling import SamplingConfig
from mdrl_jax.rl.trainer import OptimizerConfig, TrainState, make_optimizer, make_train_step, state_shardings

ROOT = Path(__file__).parents[2]
DEVICES, MESHES = 16, ((1, 16, 1), (2, 4, 2))
# Seven layers: no other dimension is 7. Rows are long, so that what is kept for the backward pass outweighs the
# state; completions longer, so that the cache does not fit on the chip (128 MiB), where it would not be counted.
CONFIG = ModelConfig("qwen2", 32000, 7, 512, 1536, 8, 2, 64, qkv_bias=True, tied=True)
ROWS, PROMPT, NEW, CHUNK = 16, 256, 768, 128
GROUP, SAMPLED = 8, 8192
LENGTH = PROMPT + NEW
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
F32, BF16 = 4, 2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler: pip install 'jax[tpu]'"
)


def compile_programs(sizes):
    """What `describe` says of the train step and the sampler on one mesh, by name."""
    model = Decoder(CONFIG, jnp.bfloat16, "full")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = make_mesh(MeshConfig(*sizes), list(devices))
    boxed = param_shapes(model)
    shapes, shardings = nn.unbox(boxed), param_shardings(mesh, boxed)
    optimizer = make_optimizer(OptimizerConfig())
    state_shards = state_shardings(optimizer, shapes, shardings, mesh)

    def array(shape, dtype, *logical):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, *logical))

    def rows(*shape, dtype=jnp.float32):
        return array((2, ROWS, *shape), dtype, None, "batch")

    def initial(params):
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(initial, shapes),
        state_shards,
    )
    loss_fn = make_grpo_loss(model, GRPOConfig(), 1.0, NEW, CHUNK)
    step = make_train_step("step", loss_fn, optimizer, state_shards, mesh)
    arrays = {"sampler_logp_BT": rows(NEW), "adv_B": rows(), "mask_BT": rows(NEW)}
    batch = PolicyBatch(
        tokens_BT=rows(LENGTH, dtype=jnp.int32),
        valid_BT=rows(LENGTH, dtype=jnp.bool_),
        grpo=GRPOBatch(old_logp_BT=None, ref_logp_BT=None, **arrays),
    )
    sampling = SamplingConfig(top_p=0.9)
    sample = make_sampler(model, "sample", group_size=GROUP, max_new_tokens=SAMPLED, eos_ids=(1,), sampling=sampling)
    prompts = (array((ROWS, PROMPT), jnp.int32, "batch"), array((ROWS, PROMPT), jnp.bool_, "batch"))
    key = array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    with jax.set_mesh(mesh):
        compiled = {
            "step": step.lower(state, batch, array((), jnp.float32), {}).compile(),
            "sample": sample.lower(state.params, *prompts, key, array((ROWS, 3), jnp.uint32, "batch", None)).compile(),
        }
        described = {name: describe(program, state) for name, program in compiled.items()}
        by_hand = lambda: jax.jit(lambda p: p["layers"]["up"], out_shardings=named(mesh)).lower(state.params)  # noqa: E731
        described["gathered"] = whole_parameters(compile_for(by_hand), state.params, over_tensor)
        long = make_grpo_loss(dataclasses.replace(model, attention=attention.splash), GRPOConfig(), 1.0, NEW, CHUNK)
        fused = make_train_step("long", long, optimizer, state_shards, mesh)
        found = compile_for(lambda: fused.lower(state, batch, array((), jnp.float32), {}), kernels=flops.kernel_flops)
        own = flops.sequences(CONFIG, 2 * ROWS, LENGTH, NEW).gradient / DEVICES
        described["long"] = {"ratio": found.flops / own, "whole": whole_parameters(found, state.params, over_tensor)}
    return described


def describe(compiled, state):
    """Bytes a device, shardings of the outputs, and the collectives and copies with the shapes they give."""
    ops = []
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) ([a-z-]+)\(", line)
        kind = re.sub("-(start|done)$", "", match[2]) if match else ""
        if kind in (*COLLECTIVES, "copy"):
            shapes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            where = re.search('op_name="([^"]*)"', line)
            ops.append({"kind": kind, "shapes": shapes, "where": where[1] if where else ""})

    def bytes_a_device(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    memory = compiled.memory_analysis()
    return {
        "ops": ops,
        "params": bytes_a_device(state.params),
        "state": bytes_a_device(state),
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "outputs": [list(s.spec) for s in jax.tree.leaves(compiled.output_shardings)],
    }


@functools.cache
def programs(mesh):
    """`compile_programs` of a mesh, once, by another process."""
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, **alone, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    command = [sys.executable, __file__, *map(str, mesh)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def elements(op):
    return max(map(math.prod, op["shapes"]), default=0)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["step", "sample"])
def test_no_collective_moves_a_layer_stack_or_logits(name, mesh):
    data, fsdp, tensor = mesh
    largest = max(
        CONFIG.d_model * CONFIG.d_mlp,  # one layer's kernel
        CONFIG.d_model * CONFIG.vocab_size // (fsdp * tensor),  # the readout, from one split to another
        CONFIG.d_model * ROWS // data * CHUNK,  # hidden states for a chunk of logits
        CONFIG.d_model * ROWS // (data * fsdp) * LENGTH,  # hidden states of a device's rows
        CONFIG.vocab_size * ROWS * GROUP // DEVICES,  # a step's logits, from one split to another
    )
    collectives = [op for op in programs(mesh)[name]["ops"] if op["kind"] in COLLECTIVES]
    assert collectives
    for op in collectives:
        assert elements(op) <= largest, op
        # Gradients of biases and norms are summed as one stack; they are smaller than any kernel.
        stacked = any(CONFIG.n_layers in shape for shape in op["shapes"])
        assert not stacked or elements(op) < CONFIG.d_model * CONFIG.head_dim, op


@pytest.mark.parametrize("mesh", MESHES)
def test_donated_state_is_aliased(mesh):
    step = programs(mesh)["step"]
    assert step["aliased"] >= step["state"]


@pytest.mark.parametrize("mesh", MESHES)
def test_decoding_moves_rows_and_leaves_weights_and_cache_in_place(mesh):
    data, fsdp, tensor = mesh
    ops = programs(mesh)["sample"]["ops"]
    decoding = [op for op in ops if "Decoder.decode" in op["where"] and op["kind"] in COLLECTIVES]
    assert decoding
    for op in decoding:
        assert elements(op) <= ROWS * GROUP // data * CONFIG.d_mlp // tensor, op
    row = CONFIG.n_layers * SAMPLED * CONFIG.n_kv_heads // tensor * CONFIG.head_dim
    for op in ops:
        assert op["kind"] != "copy" or elements(op) < ROWS * GROUP // (data * fsdp) * row, op


@pytest.mark.parametrize("mesh", MESHES)
def test_completions_stay_split_by_prompt(mesh):
    for spec in programs(mesh)["sample"]["outputs"]:
        assert "fsdp" in str(spec[:1]), spec


@pytest.mark.parametrize("mesh", MESHES)
def test_step_keeps_layer_inputs_and_works_on_one_layer(mesh):
    """Temporaries: gradients, weights in bfloat16, inputs of every layer, and one layer or one chunk of logits."""
    data, fsdp, tensor = mesh
    step, c = programs(mesh)["step"], CONFIG
    rows = ROWS // (data * fsdp)
    hidden = rows * LENGTH * c.d_model
    kernels = c.d_model * (c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.d_mlp) // tensor
    scores = rows * c.n_heads // tensor * LENGTH * LENGTH
    mlp = rows * LENGTH * c.d_mlp // tensor
    # Kernels and their gradients; scores, weights and their cotangents; gate, up, product; four of hidden.
    layer = BF16 * 2 * kernels + F32 * 2 * scores + F32 * 3 * mlp + F32 * 4 * hidden
    logits = F32 * 2 * ROWS // data * CHUNK * c.vocab_size // (fsdp * tensor)
    gradients = 2 * step["params"]  # the sum and a micro-batch's
    kept = gradients + step["params"] // 2 + BF16 * c.n_layers * hidden
    assert step["temporary"] <= kept + max(layer, logits)


@pytest.mark.parametrize("mesh", MESHES)
def test_sampler_keeps_weights_and_one_cache(mesh):
    """Temporaries: weights and readout in bfloat16, one cache, one layer of prefill, and one step's logits."""
    data, fsdp, tensor = mesh
    sample, c = programs(mesh)["sample"], CONFIG
    cached = (ROWS * GROUP * SAMPLED + ROWS * PROMPT) // (data * fsdp) * c.n_layers
    cache = BF16 * 2 * cached * c.n_kv_heads // tensor * c.head_dim
    readout = BF16 * c.vocab_size * c.d_model // (fsdp * tensor)
    rows = ROWS // (data * fsdp)
    kernels = BF16 * c.d_model * (c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.d_mlp) // tensor
    prefill = kernels + F32 * 2 * rows * c.n_heads // tensor * PROMPT * PROMPT
    logits = F32 * 4 * ROWS * GROUP * c.vocab_size // DEVICES  # as computed, by row, sorted, random bits
    assert sample["temporary"] <= sample["params"] // 2 + readout + cache + max(prefill, logits)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_parameter_gathered_by_hand_is_named(mesh):
    assert any(text.startswith("layers/up/kernel [") for text in programs(mesh)["gathered"])


@pytest.mark.parametrize("mesh", MESHES)
def test_fused_attention_is_computed_once_and_its_backward_pass_in_five_products(mesh):
    """Beside it, of layers all products but the last are made again, and those of logits."""
    long, c = programs(mesh)["long"], CONFIG
    assert long["whole"] == []
    weights, down = flops.layer_weights(c), c.d_model * c.d_mlp
    layers, logits = 2 * c.n_layers * LENGTH, 2 * c.vocab_size * c.d_model * NEW
    visited = {
        n: flops.visited_pairs(LENGTH, LENGTH, attention.SPLASH_BLOCK, n) for n in (512, attention.SPLASH_BACKWARD)
    }
    kernels = 2 * c.n_layers * c.n_heads * c.head_dim * (2 * visited[512] + 5 * visited[attention.SPLASH_BACKWARD])
    executed = layers * (4 * weights - down) + 4 * logits + kernels
    assert long["ratio"] == pytest.approx(executed / flops.sequences(c, 1, LENGTH, NEW).gradient, rel=0.02)


if __name__ == "__main__":
    print(json.dumps(compile_programs(tuple(map(int, sys.argv[1:4])))))

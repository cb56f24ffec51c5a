"""The device programs, compiled for a slice of 16 TPU v5e by the real compiler, without a TPU.

Run as a script (in a process of its own: libtpu wants its environment before JAX starts), this file compiles one
program and prints what the tests judge, as JSON.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESHES = {"fsdp": (1, 16, 1), "fsdp and tensor": (1, 8, 2)}
DEVICES = 16
LAYERS, D, F, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 7, 512, 1536, 8, 2, 64, 32000
ROWS, PROMPT, NEW, CHUNK, GROUP = 16, 64, 192, 64, 4
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PROGRAMS = ("step", "log_probs", "sample")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler: pip install 'jax[tpu]'"
)


def compile_program(name, sizes):
    """The compiled program, its bytes of parameters a device, and those of its whole train state."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from jax.experimental import topologies

    from mdrl_jax.model.families import ModelConfig
    from mdrl_jax.model.transformer import Decoder, param_shapes
    from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named, param_shardings
    from mdrl_jax.rl.grpo import GRPOBatch, GRPOConfig
    from mdrl_jax.rl.policy import PolicyBatch, make_grpo_loss, make_log_probs
    from mdrl_jax.rl.rollout import SamplingConfig, make_sampler
    from mdrl_jax.rl.trainer import OptimizerConfig, TrainState, make_optimizer, make_train_step, state_shardings

    config = ModelConfig("qwen2", VOCAB, LAYERS, D, F, HEADS, KV_HEADS, HEAD_DIM, qkv_bias=True, tied=True)
    model = Decoder(config, jnp.bfloat16, "full")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = make_mesh(MeshConfig(*sizes), list(devices))
    boxed = param_shapes(model)
    shapes, shardings = nn.unbox(boxed), param_shardings(mesh, boxed)
    optimizer = make_optimizer(OptimizerConfig())
    state_shards = state_shardings(optimizer, shapes, shardings, mesh)

    def placed(shapes, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def array(shape, dtype, *logical):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, *logical))

    def bytes_a_device(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    params = placed(shapes, shardings)
    init = lambda p: TrainState(step=jnp.int32(0), params=p, opt_state=optimizer.init(p))  # noqa: E731
    state = placed(jax.eval_shape(init, shapes), state_shards)
    length = PROMPT + NEW

    def rows(*shape, dtype=jnp.float32):
        return array((2, ROWS, *shape), dtype, None, "batch")

    tokens, valid = rows(length, dtype=jnp.int32), rows(length, dtype=jnp.bool_)
    if name == "step":
        loss_fn = make_grpo_loss(model, GRPOConfig(), 1.0, NEW, CHUNK)
        function = make_train_step(name, loss_fn, optimizer, state_shards, mesh)
        grpo = GRPOBatch(
            old_logp_BT=None, sampler_logp_BT=rows(NEW), ref_logp_BT=None, adv_B=rows(), mask_BT=rows(NEW)
        )
        batch = PolicyBatch(tokens_BT=tokens, valid_BT=valid, grpo=grpo)
        arguments = (state, batch, array((), jnp.float32))
    elif name == "log_probs":
        function = make_log_probs(model, mesh, 1.0, CHUNK)
        arguments = (params, tokens, valid, PROMPT)
    else:
        function = make_sampler(
            model, name, group=GROUP, max_new_tokens=NEW, end=(1,), sampling=SamplingConfig(top_p=0.9)
        )
        key = array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
        prompts = (array((ROWS, PROMPT), jnp.int32, "batch"), array((ROWS, PROMPT), jnp.bool_, "batch"))
        arguments = (params, *prompts, key, array((ROWS,), jnp.int32, "batch"))
    with jax.set_mesh(mesh):
        compiled = function.lower(*arguments).compile()
    return compiled, bytes_a_device(params), bytes_a_device(state)


def describe(compiled, param_bytes, state_bytes):
    """What the tests judge: memory, and each collective and copy with the shapes of its results."""
    ops = []
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) ([a-z-]+)\(", line)
        if match is None:
            continue
        kind = re.sub("-(start|done)$", "", match[2])
        if kind not in (*COLLECTIVES, "copy"):
            continue
        shapes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
        where = re.search('op_name="([^"]*)"', line)
        ops.append({"kind": kind, "shapes": shapes, "where": where[1] if where else ""})
    memory = compiled.memory_analysis()
    return {
        "ops": ops,
        "params": param_bytes,
        "state": state_bytes,
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "outputs": [list(s.spec) for s in jax_leaves(compiled.output_shardings)],
    }


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return request.param


@pytest.fixture(scope="module")
def programs(mesh):
    """Of each program on one mesh, what `describe` says."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, *map(str, MESHES[mesh])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def elements(op):
    return max(map(math.prod, op["shapes"]), default=0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_collective_moves_a_layer_stack_or_logits(programs, name):
    """The largest thing to travel is one layer's kernel, a chunk's hidden states or a device's part of the rest."""
    rows = ROWS * GROUP if name == "sample" else ROWS
    largest = max(D * F, ROWS * CHUNK * D, VOCAB * D // DEVICES, rows * VOCAB // DEVICES)
    collectives = [op for op in programs[name]["ops"] if op["kind"] in COLLECTIVES]
    assert collectives
    for op in collectives:
        assert elements(op) <= largest, op
        assert all(LAYERS not in shape for shape in op["shapes"]), op


def test_donated_state_is_aliased(programs):
    assert programs["step"]["aliased"] >= programs["step"]["state"]


def test_decoding_moves_rows_and_leaves_weights_and_cache_in_place(programs, mesh):
    ops = programs["sample"]["ops"]
    decoding = [op for op in ops if "Decoder.decode" in op["where"] and op["kind"] in COLLECTIVES]
    assert decoding
    for op in decoding:
        assert elements(op) <= ROWS * GROUP * F, op
    cache = LAYERS * ROWS * GROUP * NEW * KV_HEADS * HEAD_DIM // DEVICES
    for op in ops:
        assert op["kind"] != "copy" or elements(op) < cache or LAYERS not in op["shapes"][0], op


def test_completions_leave_by_prompt(programs):
    for spec in programs["sample"]["outputs"]:
        assert spec[:1] and "fsdp" in spec[0], spec


@pytest.mark.parametrize("name", PROGRAMS)
def test_memory_is_that_of_the_state_and_one_layer(programs, name, mesh):
    _, fsdp, tensor = MESHES[mesh]
    params, f32, bf16 = programs[name]["params"], 4, 2
    length, rows = PROMPT + NEW, ROWS // fsdp
    layer = D * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * D * F  # gathered over fsdp
    hidden = rows * length * D
    attention = rows * HEADS * length * length // tensor
    mlp = rows * length * F // tensor
    logits = ROWS * CHUNK * VOCAB // DEVICES
    # Of one layer at a time: its kernels and their gradients, scores and weights, three MLP arrays, and cotangents.
    working = bf16 * 2 * layer // tensor + f32 * 2 * attention + f32 * 2 * 3 * mlp + f32 * 4 * hidden
    chunk = f32 * 3 * logits + bf16 * 2 * ROWS * CHUNK * D
    cast = params // 2
    if name == "step":
        gradients = 2 * params
        bound = gradients + cast + bf16 * LAYERS * hidden + working + chunk
    elif name == "log_probs":
        bound = cast + working + chunk
    else:
        group_rows = ROWS * GROUP
        cache = bf16 * 2 * LAYERS * (group_rows * NEW + ROWS * PROMPT) * KV_HEADS * HEAD_DIM // DEVICES
        scores = f32 * 2 * group_rows // fsdp * HEADS * length // tensor
        draws = f32 * 6 * group_rows * VOCAB // DEVICES  # logits by vocabulary and by row, sorted, random bits
        bound = cast + cache + working + scores + draws
    print(name, mesh, programs[name]["temporary"], bound)
    assert programs[name]["temporary"] <= bound


if __name__ == "__main__":
    sizes = tuple(map(int, sys.argv[1:4]))
    print(json.dumps({name: describe(*compile_program(name, sizes)) for name in PROGRAMS}))

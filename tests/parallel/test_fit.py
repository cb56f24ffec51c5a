"""What `fit` says of programs: chips, sizes that fit, operations by hand, and its lines; without the TPU compiler."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mdrl_jax import config, main
from mdrl_jax.commands import fit
from mdrl_jax.errors import UserError
from mdrl_jax.model import flops, published
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel import chips, hlo, hlo_bytes
from mdrl_jax.parallel.fit import Compiled, by_kind, compile_for, largest, needed, temporaries, whole_parameters
from mdrl_jax.parallel.hlo import Collective
from mdrl_jax.parallel.hlo_text import Instruction
from mdrl_jax.parallel.sharding import over_tensor, param_shardings
from mdrl_jax.second_order import decoder_parts
from mdrl_jax.second_order.hvp import blocked, exact
from mdrl_jax.second_order.jets import jets
from mdrl_jax.stage import resolve_stages

GIB = 2.0**30

# --- chips ------------------------------------------------------------------------------------------------------------


def test_a_slice_names_its_chip():
    assert chips.chip_of("v5e:4x4").name == "v5e" and chips.chip_of("v5p:2x2x2").flops == 459e12
    for chip in chips.CHIPS.values():
        assert 0.9 * chip.published_gib < chip.gib <= chip.published_gib * 1e9 / 1e9 + 1
        # As published, all need some hundreds of operations a byte to be busy.
        assert 150 < chip.flops / chip.bandwidth < 600
    for wrong in ("v9:2x2", "v5e", "v5e:16", "v5e:4x4x", "4x4"):
        with pytest.raises(UserError, match="give a chip .v4, v5e, v5p, v6e."):
            chips.chip_of(wrong)


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        chips.devices("v5e:4x4")


def test_a_refusal_of_the_compiler_without_words_is_told_by_its_kind(monkeypatch):
    from jax.experimental import topologies

    def fail(**_):
        raise RuntimeError

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="v5e:4x4 is not a slice that the compiler knows: RuntimeError"):
        chips.devices("v5e:4x4")


def test_a_refusal_is_read():
    """Both ways in which the compiler puts it."""
    ours = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds"
    )
    assert needed(f"{ours} available HBM (15.75G).") == 20 * GIB
    assert needed("Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm.") == 16.5 * GIB
    assert needed("RESOURCE_EXHAUSTED: something else") == math.inf


# --- the largest size that fits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 8])
def test_the_largest_size_is_that_of_trying_them_all(unit):
    rng = np.random.default_rng(0)
    for _ in range(60):
        fixed, slope, room = rng.uniform(0, 8), rng.uniform(0.01, 2) / unit, rng.uniform(1, 16)
        most, start = unit * int(rng.integers(1, 60)), unit * int(rng.integers(1, 8))
        start, tried = min(start, most), []

        def memory(size, fixed=fixed, slope=slope, tried=tried):
            tried.append(size)
            return fixed + slope * size

        found = largest(memory, room, unit, most, {start: fixed + slope * start})
        fitting = [n for n in range(unit, most + 1, unit) if fixed + slope * n <= room]
        assert found == max(fitting, default=0)
        assert found in (0, start, *tried)  # the answer was compiled
        assert len(tried) <= 4 and all(unit <= n <= most and n % unit == 0 for n in tried)


def test_where_memory_bends_the_answer_still_fits_and_one_more_does_not():
    for room in (3.0, 9.5, 20.0, 50.0):
        memory = lambda n: 2.0 + 0.05 * n + (0.5 * (n - 16) if n > 16 else 0.0)  # noqa: E731
        found = largest(memory, room, 8, 512, {8: memory(8)})
        assert memory(found) <= room < memory(found + 8)


def test_a_refused_size_bounds_the_search():
    """The compiler may not say how much a program needs."""
    memory = lambda n: math.inf if n > 24 else 1.0 + n  # noqa: E731
    assert largest(memory, 100.0, 8, 64, {8: 9.0}) == 24
    assert largest(lambda n: math.inf, 100.0, 8, 64, {8: math.inf}) == 0


# --- operations and bytes ---------------------------------------------------------------------------------------------


def test_own_counts_are_those_of_the_compiled_model(tiny):
    """The library's attention computes all pairs of tokens; else the two are equal."""
    rows, length = 2, 16
    tokens_BT = jnp.zeros((rows, length), jnp.int32)
    apply = jax.jit(lambda p: tiny.model.apply({"params": p}, tokens_BT, tokens_BT == 0))
    counted = hlo.matmul_flops(apply.lower(tiny.params).compile().as_text())
    assert counted == rows * flops.forward(tiny.config, length, length**2, length)
    causal = flops.sequences(tiny.config, rows, length, length).forward
    attention = 4 * tiny.config.n_layers * tiny.config.n_heads * tiny.config.head_dim * rows
    assert counted - causal == attention * length * (length - 1) / 2


@pytest.mark.slow  # the count of the model is compared with its compiled programs above
def test_own_counts_of_derivatives_are_those_of_the_compiled_analysis(tiny_models):
    """With attention that computes all pairs of tokens; on a route its neurons run twice: at 0 in the MLP as well.

    No logits are made twice, in chunks neither.
    """
    rows, length, start, width, tiny = 2, 16, 8, 3, tiny_models["qwen2"]
    c, tokens_BT = tiny.config, jnp.zeros((rows, length), jnp.int32)
    own = flops.sequences(c, rows, length, length - start)
    own = dataclasses.replace(own, attention=own.attention * 2 * length / (length + 1))
    log_probs = functools.partial(decoder_parts.log_probs, tokens_BT=tokens_BT, valid_BT=tokens_BT == 0)
    given = {"start": start, "temperature": 1.0}
    whole, narrow = decoder_parts.whole(tiny.model), decoder_parts.on_route(tiny.model)
    index_LR = jnp.zeros((c.n_layers, width), jnp.int32)
    point = decoder_parts.route_slice(tiny.params, index_LR, jnp.ones(index_LR.shape))
    fixed = decoder_parts.route_fixed(tiny.params, index_LR, jnp.ones(index_LR.shape))
    slices = 2.0 * sum(x.size for x in jax.tree.leaves(point)) * rows * length

    def executed(function, *arguments):
        return hlo.matmul_flops(jax.jit(function).lower(*arguments).compile().as_text())

    def along(part, point, fixed, v):
        return jets(part, point, fixed, v, tokens_BT, tokens_BT == 0, **given)

    def loss(point, _, fixed):
        return jnp.sum(jnp.exp(log_probs(narrow, point, fixed, chunk=4, **given))), jnp.float32(1)

    gradient = jax.grad(lambda p: jnp.sum(log_probs(whole, p, (), **given)))
    assert executed(gradient, tiny.params) == own.gradient
    assert executed(functools.partial(along, whole), tiny.params, (), tiny.params) == own.jets
    for n in (1, 3):
        several = jax.tree.map(lambda x, n=n: jnp.broadcast_to(x, (n, *x.shape)), point)
        route_jets = jax.vmap(functools.partial(along, narrow), in_axes=(None, None, 0))
        assert executed(route_jets, point, fixed, several) == own.route_jets(n, slices) + (1 + 2 * n) * slices
        product = executed(blocked(exact(loss)), point, several, jnp.zeros((1, 1)), fixed)
        assert product == own.route_hessian(n, slices) + (2 + 2 * n) * slices


def test_a_sampled_token_is_computed_once():
    """Reading and sampling are together one pass over whole sequences whose last token is never read."""
    c = published.PUBLISHED["Qwen3-0.6B"]
    prompts, group, prompt, new = 3, 1, 5, 7
    whole = flops.sequences(c, prompts, prompt + new - 1, 0).forward + prompts * flops.forward(c, 0, 0, new)
    assert flops.sampled(c, prompts, group, prompt, new) == pytest.approx(whole, rel=1e-12)


def test_prompts_of_groups_are_computed_once():
    """A group of one is a whole sequence; more completions add what they are alone, behind the prompt's keys."""
    c = published.PUBLISHED["Qwen3-0.6B"]
    one, whole = flops.groups(c, 2, 1, 9, 4), flops.sequences(c, 2, 13, 4)
    assert one == whole
    four = flops.groups(c, 2, 4, 9, 4)
    added = flops.forward(c, 4, 4 * 9 + 10, 4)
    assert four.forward == pytest.approx(whole.forward + 2 * 3 * added, rel=1e-12)


def test_a_kernel_counts_the_blocks_it_visits():
    sizes = ((512, 512, 128, 128), (1024, 1024, 128, 256), (1024, 1024, 512, 1024), (256, 1024, 128, 512))
    for n_queries, length, queries, keys in sizes:
        q, k = np.arange(length - n_queries, length)[:, None], np.arange(length)[None]
        causal = (q >= k).reshape(n_queries // queries, queries, length // keys, keys).any(axis=(1, 3))
        assert flops.visited_pairs(n_queries, length, queries, keys) == causal.sum() * queries * keys
    # What the compiler writes of one device's two rows of 16 heads of 10,240 tokens.
    scratch = "f32[2,512,128]{2,1,0:T(8,128)}, f32[2,512,128]{2,1,0}, f32[2,512,128]{2,1,0}"
    forward = f"({scratch}, bf16[2,16,10240,128]{{3,2,1,0}}, f32[2,16,10240,128]{{3,2,1,0}})"
    backward = f"({scratch}, bf16[2,10,16,10240,128]{{4,3,2,1,0}}, bf16[2,4,10240,128]{{3,2,1,0}})"
    pairs = {"fwd": 210 * 512 * 512, "dkv": 110 * 512 * 1024}
    for kind, shape, products in (("fwd", forward, 2), ("dkv", backward, 5)):
        line = Instruction(f"splash_mha_{kind}_segmented.1", shape, "custom-call", (), "", False)
        assert flops.kernel_flops(line, {}) == products * 2 * 2 * 16 * 128 * pairs[kind]
    assert flops.kernel_flops(dataclasses.replace(line, name="fusion.3"), {}) == 0


def test_published_sizes_have_the_published_numbers_of_parameters():
    """In billions, as their model cards say."""
    cards = {"Qwen2.5-0.5B": 0.49, "Qwen2.5-1.5B": 1.54, "Qwen2.5-3B": 3.09, "Qwen2.5-7B-Instruct": 7.62}
    cards |= {"Qwen3-0.6B": 0.60, "Qwen3-1.7B": 1.72, "Qwen3-4B-Thinking-2507": 4.02, "Qwen3-8B": 8.19}
    cards |= {"Llama-3.2-1B": 1.24, "Llama-3.2-3B": 3.21}
    for name, billions in cards.items():
        assert published.sizes(f"some/where/{name}").n_params / 1e9 == pytest.approx(billions, abs=0.005)
    assert published.sizes("Qwen3-4B-Thinking-2507").rope_theta == 5e6
    with pytest.raises(UserError, match="known: Qwen2.5-0.5B, .*Llama-3.2-3B"):
        published.sizes("Qwen9-1B")


def test_temporaries_are_those_of_the_compilers_plan():
    """On CPU, where its summary says the same."""
    function = jax.jit(lambda x: jnp.tanh(x @ x) @ x)
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    found, summary = compile_for(lambda: function.lower(x)), function.lower(x).compile().memory_analysis()
    assert found.memory["temporaries"] == summary.temp_size_in_bytes >= 4 * 256 * 256
    assert found.bytes == 3 * 4 * 256 * 256 + found.memory["program"]
    lines = ["allocation 9: size 512, color 1, preallocated-temp:", "allocation 10: size 96, preallocated-temp:"]
    assert temporaries(lines) == 96  # the former is on-chip memory
    newer = [
        "allocation 9: size 512, color 1, page 0, preallocated-temp:",
        "allocation 2: size 64, page 0, preallocated-temp:",
    ]
    assert temporaries(newer) == 64
    with pytest.raises(RuntimeError, match="unknown form: 'allocation 3: bytes 9, preallocated-temp:'"):
        temporaries(["allocation 3: bytes 9, preallocated-temp:"])


def test_a_program_of_the_persistent_cache_is_compiled_all_the_same(tmp_path):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache"
    before = {name: getattr(jax.config, name) for name in names}
    function, x = jax.jit(lambda x: jnp.tanh(x @ x) @ x), jax.ShapeDtypeStruct((128, 128), jnp.float32)
    try:
        for name, value in zip(names, (str(tmp_path), 0.0, True), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        plain = functools.partial(function.lower, x)
        first, again = compile_for(plain), compile_for(plain)
        assert not list(tmp_path.iterdir()) and jax.config.jax_enable_compilation_cache
        plain().compile()
        assert list(tmp_path.iterdir())  # the cache works again
        assert first.memory == again.memory == compile_for(plain).memory
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_traffic_of_a_product_and_of_a_layer_scan():
    n, layers = 64, 5
    x = jax.ShapeDtypeStruct((n, n), jnp.float32)
    product = jax.jit(lambda a, b: a @ b).lower(x, x).compile().as_text()
    assert hlo_bytes.traffic(product) == 3 * 4 * n * n
    stack = jax.ShapeDtypeStruct((layers, n, n), jnp.float32)
    scan = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]).lower(x, stack).compile().as_text()
    least = layers * 3 * 4 * n * n  # each layer reads its own slice of the stack, not the stack
    assert least <= hlo_bytes.traffic(scan) <= 2.5 * least


def test_what_is_kept_on_chip_or_updated_in_place_moves_nothing_else():
    text = """HloModule m
%update (big: f32[100,8], row: f32[1,8], at: s32[]) -> f32[100,8] {
  %big = f32[100,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%big, %row, %at, %zero)
}

ENTRY %main (a: f32[100,8], b: f32[1,8], at: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %near = f32[1,8]{1,0:S(1)} negate(%b)
  ROOT %out = f32[100,8]{1,0} fusion(%a, %near, %at), kind=kLoop, calls=%update
}
"""
    reads_row, writes_row, counter = 4 * 8, 4 * 8, 4
    assert hlo_bytes.traffic(text) == reads_row + writes_row + counter


NESTED = """HloModule m
%slice (stack: f32[36,100,8], at: s32[]) -> f32[1,100,8] {
  %stack = f32[36,100,8]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,100,8]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,100,8}
}

%write (big: f32[36,100,8], row: f32[1,1,8], at: s32[]) -> f32[36,100,8] {
  %big = f32[36,100,8]{2,1,0} parameter(0)
  %row = f32[1,1,8]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[36,100,8]{2,1,0} dynamic-update-slice(%big, %row, %at, %zero, %zero)
}

%read (p: f32[36,100,8], q: bf16[36,100,8], x: f32[100,8], at: s32[]) -> f32[100,8] {
  %p = f32[36,100,8]{2,1,0} parameter(0)
  %q = bf16[36,100,8]{2,1,0} parameter(1)
  %x = f32[100,8]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %zero = s32[] constant(0)
  %a = f32[1,100,8]{2,1,0} fusion(%p, %at), kind=kLoop, calls=%slice
  %wide = f32[36,100,8]{2,1,0} convert(%q)
  %b = f32[1,100,8]{2,1,0} dynamic-slice(%wide, %at, %zero, %zero), dynamic_slice_sizes={1,100,8}
  %sum = f32[1,100,8]{2,1,0} add(%a, %b)
  %flat = f32[100,8]{1,0} bitcast(%sum)
  ROOT %out = f32[100,8]{1,0} multiply(%flat, %x)
}

%keep (c: f32[36,100,8], y: f32[100,8], at: s32[]) -> f32[36,100,8] {
  %c = f32[36,100,8]{2,1,0} parameter(0)
  %y = f32[100,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %first = f32[1,8]{1,0} slice(%y), slice={[0:1], [0:8]}
  %row = f32[1,1,8]{2,1,0} bitcast(%first)
  ROOT %new = f32[36,100,8]{2,1,0} fusion(%c, %row, %at), kind=kLoop, calls=%write
}

%whole (c: f32[36,100,8], row: f32[1,1,8], at: s32[]) -> f32[36,100,8] {
  %c = f32[36,100,8]{2,1,0} parameter(0)
  %row = f32[1,1,8]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %new = f32[36,100,8]{2,1,0} fusion(%c, %row, %at), kind=kLoop, calls=%write
  ROOT %all = f32[36,100,8]{2,1,0} negate(%new)
}

ENTRY %main (p: f32[36,100,8], q: bf16[36,100,8], x: f32[100,8], r: f32[1,1,8], at: s32[]) -> f32[36,100,8] {
  %p = f32[36,100,8]{2,1,0} parameter(0)
  %q = bf16[36,100,8]{2,1,0} parameter(1)
  %x = f32[100,8]{1,0} parameter(2)
  %r = f32[1,1,8]{2,1,0} parameter(3)
  %at = s32[] parameter(4)
  %y = f32[100,8]{1,0} fusion(%p, %q, %x, %at), kind=kOutput, calls=%read
  %kept = f32[36,100,8]{2,1,0} fusion(%p, %y, %at), kind=kLoop, calls=%keep
  ROOT %all = f32[36,100,8]{2,1,0} fusion(%kept, %r, %at), kind=kLoop, calls=%whole
}
"""


def test_of_a_stack_that_a_fusion_within_a_fusion_slices_only_the_slice_is_read():
    layer, row, stack, counter = 100 * 8, 8, 36 * 100 * 8, 4
    read = 4 * layer + 2 * layer + 4 * layer + counter + 4 * layer  # slices of p and q, x, the result
    kept = 4 * row + counter + 4 * row  # a row is read and written in place
    whole = 4 * (stack - row) + 4 * row + counter + 4 * stack  # the array that was updated is read and copied
    assert hlo_bytes.traffic(NESTED) == read + kept + whole


# --- whole parameters -------------------------------------------------------------------------------------------------


def test_a_gather_of_a_whole_parameter_is_named(tiny_models, mesh8):
    model = tiny_models["llama"].model
    boxed = param_shapes(model)
    shardings = param_shardings(mesh8, boxed)
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    shapes = jax.tree.map(
        lambda b, s: jax.ShapeDtypeStruct(b.value.shape, b.value.dtype, sharding=s), boxed, shardings, is_leaf=is_box
    )
    c = model.config
    gathers = {
        "layers/gate/kernel": (c.n_layers, c.d_model, c.d_mlp // 2),  # its tensor half, of all layers
        "layers/q/kernel": (c.n_layers, c.d_model, c.n_heads * c.head_dim),
        "embedding": (c.vocab_size, c.d_model),
        "unembedding": (c.d_model, c.vocab_size // 2),
        # Over both axes at once, along one dimension: the compiler rearranges it afterwards.
        "layers/up/kernel": (4 * c.n_layers, c.d_model // 2, c.d_mlp // 2),
    }
    fine = [(1, c.d_model, c.d_mlp // 2), (12, 8 * c.d_model), (c.d_model, c.vocab_size // 8), (4, 16, c.d_model)]

    def said(shape, kind="all-gather"):
        one = Collective(kind, 4 * math.prod(shape), 1, "jit(step)/here", (shape,))
        return whole_parameters(Compiled({}, 0, 0, (one,), 0), shapes, over_tensor)

    for name, shape in gathers.items():  # several parameters may have the same size
        assert f"{name} {list(shape)} at jit(step)/here" in said(shape)
        assert said(shape, "all-reduce") == []
    assert [said(shape) for shape in fine] == [[]] * len(fine)


def test_a_gather_that_is_compiled_is_named(mesh8, tiny_models):
    """The whole embedding asked for by hand, on CPU devices."""
    boxed = param_shapes(tiny_models["llama"].model)["embedding"]
    sharding = param_shardings(mesh8, {"embedding": boxed})["embedding"]
    x = jax.ShapeDtypeStruct(boxed.value.shape, jnp.float32, sharding=sharding)
    whole = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec())
    lower = lambda: jax.jit(lambda x: 2 * x, out_shardings=whole).lower(x)  # noqa: E731
    found = whole_parameters(compile_for(lower), {"embedding": x}, over_tensor)
    assert any(text.startswith("embedding [96, 32] at ") for text in found)


def test_collectives_are_summed_by_kind():
    found = [
        Collective("all-gather", 10, 3, ""),
        Collective("all-gather", 5, 1, ""),
        Collective("all-reduce", 7, 2, ""),
    ]
    assert by_kind(found) == {"all-gather": (35.0, 4), "all-reduce": (14.0, 2)}


# --- the command ------------------------------------------------------------------------------------------------------

STAGES = ("code", "math", "refresh-code", "analyze", "rollback-code-math")


@pytest.fixture
def slice_of_cpus(monkeypatch):
    """The eight CPU devices stand for the slice; programs are lowered, and take 1 GiB at every size.

    They are lowered at the configured size and at the largest alone: the search between them has tests of its own.
    """
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices())
    compiled = []

    def largest(bytes_of, room, unit, most, known):
        most -= most % unit
        return most if (known[most] if most in known else bytes_of(most)) <= room else 0

    monkeypatch.setattr(fit, "largest", largest)

    def lowered(lower, trips, kernels):
        compiled.append(lower())
        memory = {"program": 0.0, "arguments": GIB, "temporaries": 0.0, "outputs": 0.0, "aliased": 0.0}
        return Compiled(memory, 2e12, 1e9, (Collective("all-gather", 10**9, 2, ""),), 0.0)

    monkeypatch.setattr(fit, "compile_for", lowered)
    return compiled


def settings(**changes):
    c = config.default()
    c.stages, c.mesh.data, c.mesh.fsdp, c.mesh.tensor = STAGES, 2, 2, 2
    c.train.grad_accum_steps, c.analyze.batch, c.analyze.group_size, c.analyze.prompts = 2, 8, 2, 32
    c.update(changes)
    return c


def test_every_program_of_the_experiment_is_lowered(slice_of_cpus, capsys):
    """By the functions of a run, with arguments of a run's shapes: wrong ones do not lower."""
    assert fit.run(config.parse(settings()), "v5e:4x4", output="json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = {e["program"]: e for e in events if e["event"] == "program"}
    names = ["sample, 16 a prompt", "GRPO step", "sample scores, 4 a prompt", "sample scores, 2 a prompt"]
    names += ["sample to analyse, 2 a prompt", "gradient", "activity", "(u, w) jets", "Hv on the route"]
    names += [
        "route jets, 8 directions",
        "Lanczos step",
        "Fisher diagonal",
        "rollback scores",
        "rollback set",
        "rollback",
    ]
    assert set(rows) == set(names)
    assert len(slice_of_cpus) >= len(names)
    step = rows["GRPO step"]
    assert step["size"] == 128 and step["largest"] == 256 and step["of"] == "rows of a micro-batch"
    c = fit._sizes("tiny")[0]
    own = 3 * flops.groups(c, 16, 16, 16, 16).forward / 8  # 16 rows of a micro-batch share a prompt
    assert step["own_flops"] == own and step["recomputation"] == 2e12 / own
    assert step["collectives"] == {"all-gather": {"bytes": 2e9, "times": 2}}
    assert step["roofline_seconds"] == pytest.approx(2e12 / 197e12)
    # Beside the sampler of a training step: two moments of each parameter; of a refresh the best step and the
    # last one too, from which the length of its path is measured.
    beside = rows["GRPO step"]["beside_gib"]
    assert len(beside) == 2
    moments = rows["sample, 16 a prompt"]["beside_gib"]["optimizer"]
    assert moments == pytest.approx(sum(beside.values()), rel=1e-3)
    kv = 2 * c.n_layers * (c.n_kv_heads // 2) * c.head_dim * 4 * (16 + 16 * 16) * 16 / 4
    assert rows["sample, 16 a prompt"]["kv_gib"] == kv / GIB
    assert [e["text"] for e in events if e["event"] == "message"][-1] == f"all {len(names)} programs fit v5e:4x4"


def test_with_all_those_of_absent_stages_come_too():
    built, _ = fit.abstract_runtime(config.parse(settings(stages=("code",))), jax.devices())
    stages = resolve_stages(built.config, ("code",) + built.config.scored_domains)
    few, more = ({j.name for j in fit.merged(fit.jobs(fit.Shapes(built), stages, e))} for e in (False, True))
    assert few == {"sample, 16 a prompt", "GRPO step", "sample scores, 4 a prompt"}
    assert few < more and {"SFT step", "Hv on the route", "rollback set"} < more


def test_a_distillation_has_a_pass_of_its_teachers_and_a_step_with_what_they_say():
    forms = {f"distill-all@{form}": {"distill": {"form": form}} for form in ("full", "top_k", "fixed")}
    stages = ("code", "math", "distill-math", *forms)
    built, _ = fit.abstract_runtime(config.parse(settings(stages=stages, stage_overrides=forms)), jax.devices())
    made = resolve_stages(built.config, built.config.scored_domains)
    jobs = {j.name: j for j in fit.merged(fit.jobs(fit.Shapes(built), made, False))}
    names = {f"distillation step, {form}" for form in ("sampled", "full", "top_k", "fixed")}
    names |= {"teacher, sampled", "teacher, full", "teacher, top_k", "student's top k"}
    assert names <= set(jobs) and "teacher, fixed" not in jobs
    one = fit.Shapes(built).trees(one=1)["one"]
    assert jobs["distillation step, full"].beside == {"teacher": one, "best step": one, "last step": one}
    assert "teacher" not in jobs["distillation step, fixed"].beside
    assert jobs["teacher, sampled"].beside["parameters"] == one  # the student's, beside the teacher's own
    with jax.set_mesh(built.mesh):
        for name in ("teacher, full", "distillation step, full", "student's top k", "distillation step, top_k"):
            jobs[name].lower(jobs[name].size)


def test_the_programs_of_circuits_are_lowered():
    stages = ("code", "sft-code", "circuits-code")
    changes = {"stages": stages, "stage_overrides": {"sft-code": {"start": "base"}}, "circuits": {"block": 4}}
    built, _ = fit.abstract_runtime(config.parse(settings(**changes)), jax.devices())
    made = resolve_stages(built.config, built.config.scored_domains)
    jobs = {j.name: j for j in fit.jobs(fit.Shapes(built), made, False)}
    with jax.set_mesh(built.mesh):
        for name in ("circuit search", "masked passes", "derivatives by the heads", "attribution of heads"):
            jobs[name].lower(jobs[name].size)


def test_supervised_stages_have_their_largest_step_and_the_scores_of_their_targets():
    small = {"batch_size": 64, "length": 30}
    overrides = {"sft-code": small, "sft": {"batch_size": 96, "grad_accum_steps": 2, "length": 28}}
    for target, looks in (("", set()), ("solo-code", {"sample scores, 3 a prompt"})):
        overrides["sft-code"] = small | {"target": target}
        stages = ("solo-code", "sft-code", "sft")
        changes = {"recover": {"samples": 3}, "stage_overrides": overrides, "stages": stages}
        built, _ = fit.abstract_runtime(config.parse(settings(**changes)), jax.devices())
        found = fit.merged(
            fit.jobs(fit.Shapes(built), resolve_stages(built.config, built.config.scored_domains), False)
        )
        made = {j.name: j for j in found}
        assert made.keys() - {"sample, 16 a prompt", "GRPO step", "sample scores, 4 a prompt"} == {"SFT step", *looks}
        step = made["SFT step"]
        assert (step.size, step.most) == (64, 64) and step.own
        assert step.own(64) == flops.sequences(fit._sizes("tiny")[0], 64, 30, 29).gradient


def command(tmp_path, *arguments):
    file = tmp_path / "c.py"
    file.write_text("from mdrl_jax import config\n\ndef get_config():\n    return config.default()\n")
    return main.main(["mdrl", "fit", f"--config={file}", "--topology=v5e:4x4", *arguments])


def test_the_last_line_and_the_status_say_what_does_not_fit(slice_of_cpus, monkeypatch, tmp_path, capsys):
    sizes = ("--config.stages=('code',)", "--config.mesh.data=8", "--config.evaluate.batch=96", "--output=quiet")
    empty = {"program": 0.0, "arguments": GIB, "temporaries": 0.0, "outputs": 0.0, "aliased": 0.0}
    monkeypatch.setattr(fit, "compile_for", lambda lower, trips, kernels: Compiled(empty, 0.0, 0.0, (), 0.0))
    assert command(tmp_path, *sizes) == 0
    assert capsys.readouterr().out.strip() == "all 3 programs fit v5e:4x4"
    refused = lambda lower, trips, kernels: Compiled({"refused": 20 * GIB}, math.nan, math.nan, (), 0.0)  # noqa: E731
    monkeypatch.setattr(fit, "compile_for", refused)
    assert command(tmp_path, *sizes) == 1
    assert capsys.readouterr().out.strip() == (
        "3 of 3 programs do not fit v5e:4x4: sample, 16 a prompt; GRPO step; sample scores, 4 a prompt"
    )


def test_the_table_shows_what_does_not_fit(slice_of_cpus, monkeypatch, capsys):
    built, _ = fit.abstract_runtime(config.parse(settings(stages=("code",))), jax.devices())
    monkeypatch.setattr(
        fit, "compile_for", lambda lower, trips, kernels: Compiled({"refused": 20 * GIB}, math.nan, math.nan, (), 3.0)
    )
    chip = chips.CHIPS["v5e"]
    row = fit.fitted(fit.merged(fit.jobs(fit.Shapes(built), (), True))[-1], built, chip)
    from rich.console import Console

    Console(width=160).print(fit.table([row], chip, "v5e:4x4"))
    shown = capsys.readouterr().out
    assert "15.75 of the 16 GiB of a device" in shown and "20.00" in shown and " NO " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=v9:4x4",), "--topology=v9:4x4 is not known; give a chip"),
        (("--config.mesh.fsdp=3", "--config.mesh.data=1"), "does not match the 8 devices at hand"),
        (("--config.model.path=Qwen9-1B",), "nor a published model whose sizes are known; known: Qwen2.5-0.5B"),
        (("--config.mesh.data=8",), "evaluate.batch=100 is not divisible by the mesh's data * fsdp = 8"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(slice_of_cpus, tmp_path, capsys, arguments, message):
    assert command(tmp_path, *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


SMALL_ANALYSIS = {"batch": 3, "group_size": 4, "prompts": 24, "path_prompts": 12}
NOT_DIVIDED = "is not divisible by the mesh's data * fsdp = 8"


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        (("code",), {"train.prompts_per_step": 4}, f"stage code: prompts_per_step = 4 {NOT_DIVIDED}"),
        (("sft",), {"sft.batch_size": 12}, f"stage sft: sft.batch_size / sft.grad_accum_steps = 12 {NOT_DIVIDED}"),
        (("sft",), {"sft.length": 100000}, "stage sft: sft.length=100000, but the model allows"),
        (("code", "analyze"), SMALL_ANALYSIS, f": analyze.batch * group_size = 12 {NOT_DIVIDED}"),
        (("code", "math", "rollback-code-math"), SMALL_ANALYSIS, ": analyze.batch * group_size = 12"),
        (
            ("code", "protect-math"),
            SMALL_ANALYSIS,
            f"stage protect-math: analyze.batch * group_size = 12 {NOT_DIVIDED}",
        ),
        (("code", "math", "rollback-code-math"), {"recover.rules": ("none",)}, "recover.rules names 'none'"),
    ],
)
def test_sizes_are_checked_as_in_a_run(slice_of_cpus, tmp_path, capsys, stages, changes, message):
    changes = {(f"analyze.{k}" if "." not in k else k): v for k, v in changes.items()}
    sizes = {"stages": stages, "mesh.data": 8, "evaluate.batch": 96} | changes
    assert command(tmp_path, *(f"--config.{name}={value}" for name, value in sizes.items())) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not slice_of_cpus


def test_sizes_of_absent_stages_are_checked_with_all(slice_of_cpus):
    sizes = {"data": 8, "fsdp": 1, "tensor": 1}
    c = settings(stages=("code",), mesh=sizes, evaluate={"batch": 96}, train={"grad_accum_steps": 1})
    c.sft.batch_size = 12
    with pytest.raises(UserError, match="^sft.batch_size / sft.grad_accum_steps = 12 is not divisible"):
        fit.run(config.parse(c), "v5e:4x4", everything=True, output="quiet")
    c.sft.batch_size, c.analyze.batch, c.analyze.group_size = 16, 2, 2
    with pytest.raises(UserError, match=r"^analyze.batch \* group_size = 4 is not divisible"):
        fit.run(config.parse(c), "v5e:4x4", everything=True, output="quiet")
    assert not slice_of_cpus
    assert fit.run(config.parse(c), "v5e:4x4", output="quiet")

"""Matrix products and collectives of compiled programs against hand counts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdrl_jax.parallel import hlo, hlo_text
from mdrl_jax.parallel.sharding import named, spec

B, D, F, V = 6, 16, 24, 10


def compiled(function, *shapes, **jit_options):
    """HLO text of a function of float32 arrays (shapes as tuples), without `metadata`."""
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes]
    return jax.jit(function, **jit_options).lower(*arrays).compile().as_text()


def product(*sizes):
    """FLOPs of one product."""
    return 2 * np.prod(sizes)


def forget_trips(text):
    """The text as a compiler writes it that leaves trip counts out, as that for TPUs does."""
    stripped = re.sub(r", backend_config=\{.*known_trip_count.*", "", text)
    assert "known_trip_count" not in stripped and stripped != text
    return stripped


def layers(x_BD, kernels_LDD):
    return jax.lax.scan(lambda x_BD, kernel_DD: (jnp.tanh(x_BD @ kernel_DD), None), x_BD, kernels_LDD)[0]


# --- products ---------------------------------------------------------------------------------------------------------


def test_one_product():
    assert hlo.matmul_flops(compiled(jnp.matmul, (B, D), (D, F))) == product(B, D, F)


def test_a_product_inside_a_fusion():
    text = compiled(lambda x, w, b: jax.nn.relu(x @ w + b[None]), (B, D), (D, F), (F,))
    assert hlo.matmul_flops(text) == product(B, D, F)


@pytest.mark.parametrize("equation", ["abtd,abde->abte", "tabd,aebd->abte", "abtd,cabd->abtc"])
def test_batched_products(equation):
    sizes = {"a": 3, "b": 2, "t": 5, "d": D, "e": 7, "c": 11}
    shapes = [tuple(sizes[i] for i in part) for part in equation.split("->")[0].split(",")]
    expected = product(*(sizes[i] for i in set(equation) - set(",->")))
    assert hlo.matmul_flops(compiled(lambda x, y: jnp.einsum(equation, x, y), *shapes)) == expected


def test_a_product_of_several_contracted_axes():
    text = compiled(lambda x, w: jnp.einsum("bthd,hde->bte", x, w), (B, 3, 4, 5), (4, 5, D))
    assert hlo.matmul_flops(text) == product(B, 3, 4, 5, D)


def test_no_product():
    assert hlo.matmul_flops(compiled(jnp.tanh, (B, D))) == 0


# --- loops ------------------------------------------------------------------------------------------------------------


def test_a_scan_counts_each_layer():
    text = compiled(layers, (B, D), (5, D, D))
    assert hlo.matmul_flops(text) == 5 * product(B, D, D)


def test_nested_scans_multiply():
    def twice(x_BD, kernels_LDD):
        return jax.lax.scan(lambda x, _: (layers(x, kernels_LDD), None), x_BD, length=7)[0] @ kernels_LDD[0]

    text = compiled(twice, (B, D), (5, D, D))
    assert hlo.matmul_flops(text) == (7 * 5 + 1) * product(B, D, D)


def test_gradient_of_a_scan():
    """Forward, and two products a layer backward; without the gradient of the input, one less in all."""
    both = compiled(jax.grad(lambda *a: layers(*a).sum(), argnums=(0, 1)), (B, D), (5, D, D))
    assert hlo.matmul_flops(both) == 3 * 5 * product(B, D, D)


def test_recomputation_counts():
    def loss(x_BD, kernels_LDD):
        body = jax.checkpoint(lambda x, k: (jnp.tanh(x @ k), None), prevent_cse=True)
        return jax.lax.scan(body, x_BD, kernels_LDD)[0].sum()

    text = compiled(jax.grad(loss, argnums=(0, 1)), (B, D), (5, D, D))
    assert hlo.matmul_flops(text) == 4 * 5 * product(B, D, D)


def test_cost_analysis_counts_a_loop_once():
    """The reason for this module; if it fails, the compiler has learnt to count."""
    programs = [jax.jit(layers).lower(jnp.ones((B, D)), jnp.ones((n, D, D))).compile() for n in (5, 50)]
    few, many = (program.cost_analysis()["flops"] for program in programs)
    assert many < 2 * few
    assert hlo.matmul_flops(programs[1].as_text()) == 10 * hlo.matmul_flops(programs[0].as_text())


@pytest.mark.parametrize("start", [0, 3])
def test_trip_count_read_from_the_loop_itself(start):
    def loop(x_DD):
        return jax.lax.while_loop(lambda c: c[1] < 11, lambda c: (jnp.sin(c[0] @ x_DD), c[1] + 1), (x_DD, start))[0]

    text = compiled(loop, (D, D))
    assert hlo.matmul_flops(text) == hlo.matmul_flops(forget_trips(text)) == (11 - start) * product(D, D, D)


def test_trip_counts_of_nested_scans_read_from_the_loops():
    def twice(x_BD, kernels_LDD):
        return jax.lax.scan(lambda x, _: (layers(x, kernels_LDD), None), x_BD, length=7)[0]

    text = forget_trips(compiled(twice, (B, D), (5, D, D)))
    assert hlo.matmul_flops(text) == 7 * 5 * product(B, D, D)


def test_a_loop_that_may_stop_early_counts_to_the_end():
    def loop(x_DD):
        def going(c):
            return (c[1] < 9) & jnp.any(c[0] > 0)

        return jax.lax.while_loop(going, lambda c: (jnp.sin(c[0] @ x_DD), c[1] + 1), (x_DD, 0))[0]

    assert hlo.matmul_flops(compiled(loop, (D, D))) == 9 * product(D, D, D)


def test_a_trip_count_that_nobody_knows_is_refused_or_given():
    def loop(x_DD, n):
        return jax.lax.fori_loop(0, n, lambda _, y_DD: y_DD @ x_DD, x_DD)

    text = compiled(loop, (D, D), jax.ShapeDtypeStruct((), jnp.int32))
    with pytest.raises(ValueError, match="trip count of loop .*while"):
        hlo.matmul_flops(text)
    assert hlo.matmul_flops(text, unknown_trips=4) == 4 * product(D, D, D)
    assert hlo.collectives(text) == []  # nothing of the kind in it: its trips do not matter


# --- branches and calls -----------------------------------------------------------------------------------------------


def test_the_larger_branch_of_a_conditional():
    def choose(one, x_BD, w_DD):
        # Neither branch may be so small that the compiler runs both and selects.
        return jax.lax.cond(one, lambda: layers(x_BD, w_DD[None]), lambda: layers(x_BD, jnp.stack([w_DD] * 4)))

    text = compiled(choose, jax.ShapeDtypeStruct((), jnp.bool_), (B, D), (D, D))
    assert " conditional(" in text
    assert hlo.matmul_flops(text) == 4 * product(B, D, D)


def test_the_larger_branch_of_a_switch():
    def choose(i, x_BD, w_DD):
        return jax.lax.switch(i, [lambda n=n: layers(x_BD, jnp.stack([w_DD] * n)) for n in (2, 7, 3)])

    text = compiled(choose, jax.ShapeDtypeStruct((), jnp.int32), (B, D), (D, D))
    assert hlo.matmul_flops(text) == 7 * product(B, D, D)


def test_branches_that_are_taken_equally_often_count_with_their_mean():
    def choose(i, x_BD, w_DD):  # other numbers of layers than above: JAX's cache ignores the names of scopes
        with jax.named_scope(hlo_text.EQUALLY):
            return jax.lax.switch(i, [lambda n=n: layers(x_BD, jnp.stack([w_DD] * n)) for n in (1, 6, 5)])

    def often(x_BD, w_DD):
        return jax.lax.fori_loop(0, 12, lambda i, y_BD: choose(i % 3, y_BD, w_DD), x_BD)

    text = compiled(choose, jax.ShapeDtypeStruct((), jnp.int32), (B, D), (D, D))
    assert hlo.matmul_flops(text) == pytest.approx(4 * product(B, D, D))
    assert hlo.matmul_flops(compiled(often, (B, D), (D, D))) == pytest.approx(12 * 4 * product(B, D, D))


# --- a network --------------------------------------------------------------------------------------------------------


def test_gradient_of_an_mlp_by_hand():
    """Three times the forward products, less the gradient of the input, which nobody asks for."""

    def loss(weights, x_BD, y_BV):
        hidden_BF = jnp.tanh(x_BD @ weights[0])
        logits_BV = jnp.tanh(hidden_BF @ weights[1]) @ weights[2]
        return jnp.sum((logits_BV - y_BV) ** 2)

    weights = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((D, F), (F, F), (F, V))]
    text = compiled(jax.value_and_grad(loss), weights, (B, D), (B, V))
    forward = product(B, D, F) + product(B, F, F) + product(B, F, V)
    assert hlo.matmul_flops(text) == 3 * forward - product(B, D, F)


# --- what other compilers make of a dot -------------------------------------------------------------------------------

MODULE = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = {a}{{1,0:T(8,128)}} parameter(0)
  %b = {b}{{1,0}} parameter(1)
  ROOT %c = {c} {call}, metadata={{op_name="jit(f)/dot(general)"}}
}}
"""


@pytest.mark.parametrize(
    "a, b, c, call, flops",
    [
        # TPU: a product; two batch axes (2, 8) as dilated spatial ones: [2, 256, 8, 64] x [2, 256, 8, 64].
        ("f32[256,64]", "f32[64,32]", "f32[256,32]{1,0}", "convolution(%a, %b), dim_labels=bf_io->bf", (256, 64, 32)),
        (
            "f32[2,256,8,64]",
            "f32[2,256,8,64]",
            "f32[2,8,256,256]{2,3,1,0:T(8,128)}",
            "convolution(%a, %b), window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=0b1f_0o1i->01bf",
            (2, 8, 256, 256, 64),
        ),
        # A true convolution of width 3 over 64 places, padded by 1 on the right, taking every other.
        (
            "f32[8,64,16]",
            "f32[3,16,32]",
            "f32[8,32,32]{2,1,0}",
            "convolution(%a, %b), window={size=3 stride=2 pad=0_1}, dim_labels=b0f_0io->b0f",
            (8, 32 * 3 - 1, 16, 32),
        ),
        # GPU: a call of cuBLAS, which gives its workspace too; CPU: a call of oneDNN.
        (
            "f32[5,64,32]",
            "f32[5,64,7]",
            "(f32[5,32,7]{2,1,0}, s8[4194304]{0})",
            'custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}',
            (5, 64, 32, 7),
        ),
        (
            "f32[5,64,32]",
            "f32[5,7,32]",
            "f32[5,64,7]{2,1,0}",
            'custom-call(%a, %b), custom_call_target="__onednn$matmul"',
            (5, 64, 32, 7),
        ),
        ("f32[4,8]", "f32[4,8]", "f32[4,8]{1,0}", 'custom-call(%a, %b), custom_call_target="Sharding"', (0,)),
    ],
)
def test_products_under_other_names(a, b, c, call, flops):
    assert hlo.matmul_flops(MODULE.format(a=a, b=b, c=c, call=call)) == product(*flops)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.matmul_flops("nothing")


LOOPS = """HloModule m
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4] get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]) tuple(%next, %y)
}

%condition (p: (s32[], f32[4,4])) -> pred[] {
  %p = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] BOUND
  ROOT %going = pred[] compare(%i, %end), direction=LT
}

%outer (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]) parameter(0)
  ROOT %inner = (s32[], f32[4,4]) while(%p), condition=%condition, body=%body
}

%unknown (p: (s32[], f32[4,4])) -> pred[] {
  %p = (s32[], f32[4,4]) parameter(0)
  ROOT %going = pred[] custom-call(%p), custom_call_target="host"
}

ENTRY %main (x: f32[4,4]) -> (s32[], f32[4,4]) {
  %x = f32[4,4] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]) tuple(%zero, %x)
  ROOT %all = (s32[], f32[4,4]) while(%start), condition=CONDITION, body=BODY
}
"""


def loops(step, bound, condition, body):
    named = {"STEP": step, "BOUND": bound, "CONDITION": condition, "BODY": body}
    return functools.reduce(lambda text, name: text.replace(name, str(named[name])), named, LOOPS)


@pytest.mark.parametrize(("step", "end", "trips"), [(1, 8, 8), (2, 8, 4), (3, 8, 3)])
def test_a_loop_that_the_compiler_unrolled_counts_its_own_trips(step, end, trips):
    """As it does with products that wait for gathers, a shard at a time: the counter then grows by 2."""
    text = loops(step, f"constant({end})", "%condition", "%body")
    assert hlo.matmul_flops(text) == trips * product(4, 4, 4)


def test_unknown_trips_are_given_from_the_innermost_loop_on():
    text = loops(1, 'custom-call(%i), custom_call_target="host"', "%unknown", "%outer")
    assert hlo.matmul_flops(text, unknown_trips=(7, 3)) == 21 * product(4, 4, 4)
    assert hlo.matmul_flops(text, unknown_trips=5) == 25 * product(4, 4, 4)
    with pytest.raises(ValueError, match="trip count"):
        hlo.matmul_flops(text, unknown_trips=(7,))
    inner = "while(%p), condition=%condition, body=%body"  # if its trips are read, it is none of them
    known = text.replace(inner, inner + ', backend_config={"known_trip_count":{"n":"6"}}')
    assert hlo.matmul_flops(known, unknown_trips=(3,)) == 18 * product(4, 4, 4)


def test_kernels_that_the_compiler_cannot_see_are_counted_where_they_run():
    text = loops(1, "constant(6)", "%condition", "%body").replace(
        "%y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        '%y = f32[4,4] custom-call(%x), custom_call_target="tpu_custom_call"',
    )
    assert hlo.matmul_flops(text) == 0
    assert hlo.matmul_flops(text, kernels=lambda i, _: 10.0 if i.opcode == "custom-call" else 0.0) == 60


# --- collectives ------------------------------------------------------------------------------------------------------


def everything(mesh: Mesh):
    """Each kind of collective over `data` (2 of the mesh's 8 devices), two of them in a layer scan."""

    def local(x_BD, kernels_LDD):
        def body(x_BD, kernel_DD):
            whole_DD = jax.lax.all_gather(kernel_DD, "data", tiled=True)
            return jax.lax.psum(x_BD @ whole_DD, "data"), None

        x_BD, _ = jax.lax.scan(body, x_BD, kernels_LDD)
        return (
            jax.lax.psum_scatter(x_BD, "data", tiled=True),
            jax.lax.ppermute(x_BD, "data", [(0, 1), (1, 0)]),
            jax.lax.all_to_all(x_BD, "data", 0, 0, tiled=True),
        )

    rows = spec("rows")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec(), spec(None, "rows")), out_specs=(rows,) * 3, check_vma=False
    )


def test_collectives_by_kind_bytes_and_trips(mesh8):
    text = compiled(everything(mesh8), (B, D), (5, D, D))
    found = {c.kind: (c.bytes, c.times) for c in hlo.collectives(text)}
    rows, kernel = 4 * B * D, 4 * D * D
    assert found == {
        "all-gather": (kernel, 5),
        "all-reduce": (rows, 5),
        "reduce-scatter": (rows, 1),
        "collective-permute": (rows, 1),
        "all-to-all": (rows, 1),
    }
    assert len(hlo.collectives(text)) == 5
    assert all("shard_map" in c.where for c in hlo.collectives(text))


def test_figures_are_those_of_one_device(mesh8):
    """Rows split over four devices: a quarter of the products, and the gradient summed over them."""
    shards = (named(mesh8, "batch"), named(mesh8))
    text = compiled(
        jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), 1), (8, D), (D, F), in_shardings=shards, out_shardings=shards[1]
    )
    assert hlo.matmul_flops(text) == 2 * product(8 // 4, D, F)
    assert [(c.kind, c.bytes, c.times) for c in hlo.collectives(text)] == [("all-reduce", 4 * D * F, 1)]


ASYNC = """HloModule m

%scatter (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
  %id = u32[] partition-id()
  ROOT %own = f32[2,4]{1,0} dynamic-slice(%sum, %id), dynamic_slice_sizes={2,4}
}

%begin (q: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %q = bf16[8,4]{1,0} parameter(0)
  %g = bf16[32,4]{1,0} all-gather(%q), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (r: bf16[8,4]) -> bf16[32,4] {
  %r = bf16[8,4]{1,0} parameter(0)
  %h = bf16[32,4]{1,0} all-gather(%r), channel_id=2, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = bf16[32,4]{1,0} custom-call(%h), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8,4], b: bf16[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %f = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%scatter
  %begun = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%b), kind=kCustom, calls=%begin
  %ended = bf16[32,4]{1,0} fusion(%b), kind=kCustom, calls=%end
  %gs = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%b), channel_id=3, dimensions={0}
  %gd = bf16[16,4]{1,0} all-gather-done(%gs)
  ROOT %out = f32[2,4]{1,0} copy(%f)
}
"""


def test_asynchronous_collectives_count_once():
    """As TPU compilers write them (the all-reduce that keeps a slice is a reduce-scatter), and as GPU ones do."""
    found = [(c.kind, c.bytes, c.times) for c in hlo.collectives(ASYNC)]
    assert found == [("reduce-scatter", 128, 1), ("all-gather", 256, 1), ("all-gather", 128, 1)]

"""The device programs of the interference analysis and of a rollback, for the command `fit` (see `fit_programs.py`)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mdrl_jax.analysis import probe
from mdrl_jax.analysis.circuits import masks, study
from mdrl_jax.analysis.routes import SHARE
from mdrl_jax.analysis.samples import sampled_at_once
from mdrl_jax.analysis.subspace import conflict
from mdrl_jax.commands.fit_programs import F32, I32, ROWS, Job, Shapes, sampling
from mdrl_jax.model import flops
from mdrl_jax.parallel.counting import KEY_BITS
from mdrl_jax.parallel.fit import bytes_a_device
from mdrl_jax.parallel.sharding import batch_divisor, named, stacked
from mdrl_jax.recovery.rollback import evidence, selection
from mdrl_jax.recovery.rollback import rules as rollback
from mdrl_jax.rl.policy import shared_rows
from mdrl_jax.second_order import blocks, decoder_parts
from mdrl_jax.second_order.fisher import squares_program

DIRECTIONS = 8  # number of directions whose route jets are computed in one call


def analysis(shapes: Shapes, stages: int) -> Iterator[Job]:
    """Yields the programs of the interference analysis.

    In this order: the sampler, the gradient, the activity of neurons and heads, the (u, w) jets, products with the
    Hessian on the route, route jets, and the orthogonalisation of a Lanczos step. The route is the widest possible one.

    Args:
      shapes: shapes of the programs' arguments.
      stages: number of stages to analyse, solo stages not counted. It decides how many edits are held beside a program.

    Raises:
      UserError: when the first job, the sampler, is asked for, as in `fit_programs.sampling`.
    """
    runtime, section = shapes.runtime, shapes.runtime.config.analyze
    programs = probe.build(runtime, runtime.config.train.grpo).programs
    n, config, later = section.batch * section.group_size, runtime.model.config, max(stages - 1, 0)
    rows = dataclasses.replace(shapes.rows(n), group=section.group_size)
    params, scalar = shapes.params, shapes.array((), F32)
    point, directions = _on_route(shapes), _on_route(shapes, DIRECTIONS)
    block = _on_route(shapes, section.lanczos_block)
    basis = _on_route(shapes, section.lanczos_block * section.lanczos_steps)
    vectors = _on_route(shapes, section.vectors)
    fixed = {"params": params, "keep_LF": shapes.array((config.n_layers, config.d_mlp), F32, None, "mlp")}
    shared = shared_rows(section.group_size, n, batch_divisor(runtime.mesh))
    own = flops.groups(config, n // shared, shared, shapes.prompt, shapes.new)
    whole = flops.sequences(config, n, shapes.prompt + shapes.new, shapes.new)
    tokens = n // shared * shapes.prompt + n * shapes.new
    narrow = 2.0 * sum(math.prod(x.shape) for x in jax.tree.leaves(point)) * tokens

    def job(name: str, program: str, beside: Mapping[str, float], own: float, *given: Any) -> Job:
        lower = lambda _: programs[program].lower(*given)  # noqa: E731
        return Job(name, lower, beside, n, ROWS, own=lambda _: own)

    at_once = sampled_at_once(section.prompts, section.batch, runtime.config.evaluate.batch)
    how, on_path = runtime.config.rollout.sampling, shapes.trees(checkpoints=2, displacement=1)
    name = f"sample to analyse, {section.group_size} a prompt"
    yield sampling(shapes, name, at_once, section.group_size, how, on_path)
    at_point = shapes.trees(checkpoints=1, edits=1 + later)
    yield job("gradient", "gradient", at_point | shapes.trees(gradients=section.held - 1), own.gradient, params, rows)
    yield job("activity", "activity", at_point, whole.forward, params, rows)
    crossed = shapes.trees(checkpoints=1, edits=max(later, 1))
    yield job("(u, w) jets", "jets", crossed, own.jets, params, params, rows)
    at_place = shapes.trees(checkpoints=1, displacement=1)
    spanned = {"Lanczos basis": bytes_a_device(basis), "blocks": bytes_a_device(block)}
    found = {"Lanczos vectors": 3 * bytes_a_device(vectors)}
    on_route, spent = (point, block, rows, fixed, scalar, block), own.route_hessian(section.lanczos_block, narrow)
    yield job("Hv on the route", "hessian", at_place | spanned, spent, *on_route)
    on_route, spent = (point, fixed, directions, rows), own.route_jets(DIRECTIONS, narrow)
    yield job(f"route jets, {DIRECTIONS} directions", "route_jets", at_place | found, spent, *on_route)
    step = blocks.programs(block).orthogonalise
    yield Job("Lanczos step", lambda _: step.lower(basis, block, scalar), at_place | shapes.trees(parameters=1))


def circuits(shapes: Shapes) -> Iterator[Job]:
    """Yields the largest programs of a stage `circuits-D`: search, masked passes, derivatives, attribution.

    The time of masked passes is that of passes through all layers, which those that differ from another one in a later
    head do not run.

    Prompts and replies are assumed to be as long as the config allows, and base and source prompts to differ from
    their first token on.
    """
    runtime, c, config = shapes.runtime, shapes.runtime.config.circuits, shapes.runtime.model.config
    model: Any = runtime.model
    programs = masks.build(model, runtime.config.rollout.sampling.temperature, study.how(c))
    n, length = c.block, shapes.prompt + shapes.new
    tokens = shapes.array((n, 2, length), I32, "batch")
    reply = shapes.array((n, 2, shapes.new), F32, "batch")
    rows = masks.PairRows(tokens, tokens, shapes.array((n, 2, length), bool, "batch"), reply)
    heads, searches = (config.n_layers, config.n_heads), len(c.penalties) * len(masks.STARTS) * c.seeds
    start, price = shapes.array((searches, *heads), F32), shapes.array((searches,), F32)
    tried, mask = shapes.array((c.at_once, *heads), F32), shapes.array(heads, F32)
    split = lambda x: shapes.array(x.shape, x.dtype, None, "batch", None, *("heads",)[: x.ndim - 4])  # noqa: E731
    shared = jax.tree.map(split, jax.eval_shape(programs.shared, shapes.params, rows))
    like = (split(jax.eval_shape(programs.inputs, shapes.params, rows, mask, shared)), shapes.array((), I32))
    for name, lowered, given in (
        ("circuit search", programs.search, (rows, start, price)),
        ("masked passes", programs.log_probs, (rows, tried, shared, like)),
        ("derivatives by the heads", programs.slopes, (rows, mask, shared)),
        ("attribution of heads", programs.attribution, (rows,)),
    ):
        yield Job(name, lambda _, lowered=lowered, given=given: lowered.lower(shapes.params, *given))


def taking_back(shapes: Shapes) -> Iterator[Job]:
    """Yields the programs of a rollback: of its evidence, of scores and sets of coordinates, and of trials.

    In this order: the gradient, the Fisher diagonal, the scores of coordinates, the set of the largest scores, the
    rollback itself, and the sampler of the scores of a trial.

    Raises:
      UserError: when the sampler, the last one, is asked for, as in `fit_programs.sampling`.
    """
    runtime, config = shapes.runtime, shapes.runtime.config
    params, chosen, scalar = shapes.params, shapes.masks(), shapes.array((), F32)
    built, n = probe.build(runtime, config.train.grpo), config.analyze.batch * config.analyze.group_size
    rows = dataclasses.replace(shapes.rows(n), group=config.analyze.group_size)
    rules = len(config.recover.rules)
    # While gradients of the domain are computed, the scores of the rules before are held.
    before = max((i for i, rule in enumerate(config.recover.rules) if rule in evidence.NEEDS_DATA), default=0)
    shared = shared_rows(config.analyze.group_size, n, batch_divisor(runtime.mesh))
    own = flops.groups(runtime.model.config, n // shared, shared, shapes.prompt, shapes.new).gradient
    whole = flops.sequences(runtime.model.config, n, shapes.prompt + shapes.new, shapes.new).gradient
    places = {"places": 2 * bytes_a_device(chosen)}
    # Two checkpoints (θ_T and the peak) and two edits are held; one checkpoint is the program's argument, so it is not
    # counted as held beside it.
    asked = shapes.trees(checkpoints=1, edits=2, displacement=1, scores=before) | places
    gradient = built.programs["gradient"]
    yield Job("gradient", lambda _: gradient.lower(params, rows), asked, n, ROWS, own=lambda _: own)
    squares = squares_program(built.fused, runtime.shardings)
    told = asked | shapes.trees(gradient=1)
    yield Job("Fisher diagonal", lambda _: squares.lower(params, params, rows), told, n, ROWS, own=lambda _: whole)
    given = rollback.Evidence(edit=params, peak_gradient=params, fisher=params, kappa=scalar)
    told = shapes.trees(checkpoints=2, edits=1, displacement=1, scores=rules - 1) | places
    yield Job("rollback scores", lambda _: evidence.PROGRAMS["adding"].lower(given), told)
    count = shapes.array((), I32), shapes.array((), I32)
    tried = shapes.trees(checkpoints=2, edits=1, scores=rules - 1) | {"places": bytes_a_device(chosen)}
    halvings = lambda _: (KEY_BITS,)  # noqa: E731
    yield Job("rollback set", lambda _: selection.largest_program.lower(params, count, chosen), tried, trips=halvings)
    tried = shapes.trees(checkpoints=1, scores=rules) | places
    yield Job("rollback", lambda _: rollback.taken_back.lower(params, params, chosen, scalar), tried)
    held = shapes.trees(checkpoints=2, edits=1, scores=rules) | places | {"set": bytes_a_device(chosen)}
    name, evaluated = f"sample scores, {config.recover.samples} a prompt", config.evaluate
    yield sampling(shapes, name, evaluated.batch, config.recover.samples, evaluated.sampling, held)


def _on_route(shapes: Shapes, *leading: int) -> Any:
    """Vectors on the widest possible route, which has the share `SHARE` of each layer's neurons."""
    config, mesh = shapes.runtime.model.config, shapes.runtime.mesh
    width = conflict.round_up(math.ceil(SHARE * config.d_mlp))
    with jax.set_mesh(mesh):
        axes = decoder_parts.route_axes(width)

    def part(name: str, *sizes: int) -> jax.ShapeDtypeStruct:
        sharding = named(mesh, *axes[name])
        shape = (*leading, config.n_layers, *sizes)
        return jax.ShapeDtypeStruct(shape, F32, sharding=stacked(sharding) if leading else sharding)

    into = config.d_model, width
    return {"gate": part("gate", *into), "up": part("up", *into), "down": part("down", width, config.d_model)}

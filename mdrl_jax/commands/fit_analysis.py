"""The device programs of the interference analysis and of a rollback, for `fit` (see `fit_programs.py`)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mdrl_jax.analysis import blocks, probe
from mdrl_jax.analysis.routes import SHARE
from mdrl_jax.analysis.samples import sampled_at_once
from mdrl_jax.commands.fit_programs import F32, I32, ROWS, Job, Shapes, sampling
from mdrl_jax.model import flops
from mdrl_jax.parallel.fit import bytes_a_device
from mdrl_jax.parallel.sharding import named, stacked
from mdrl_jax.recovery import evidence, rollback, selection
from mdrl_jax.recovery.fisher import squares_program

DIRECTIONS = 8  # of `ladder`, at a time


def analysis(shapes: Shapes, stages: int) -> Iterator[Job]:
    """What the interference analysis of so many stages runs.

    Passes of the model: 3 for a gradient, 5 for (u, w) along a direction of all weights; on a route 2 for each vector
    of a Hessian product or direction of (u, w), and 2 and 1 for what they share (`curvature.py`, `jets.py`).
    """
    runtime, section = shapes.runtime, shapes.runtime.config.analyze
    programs = probe.build(runtime, runtime.config.train.grpo).programs
    n, config, later = section.batch * section.group, runtime.model.config, max(stages - 1, 0)
    rows, params, scalar = shapes.rows(n), shapes.params, shapes.array((), F32)
    point, directions = _on_route(shapes), _on_route(shapes, DIRECTIONS)
    block = _on_route(shapes, section.lanczos_block)
    basis = _on_route(shapes, section.lanczos_block * section.lanczos_steps)
    fixed = {"params": params, "keep_LF": shapes.array((config.n_layers, config.d_mlp), F32, None, "mlp")}
    forward = flops.sequences(config, n, shapes.prompt + shapes.new, shapes.new)

    def job(name: str, program: str, beside: Mapping[str, float], passes: float, *given: Any) -> Job:
        lower = lambda _: programs[program].lower(*given)  # noqa: E731
        return Job(name, lower, beside, n, ROWS, own=lambda _: passes * forward)

    at_once = sampled_at_once(section.prompts, section.batch, runtime.config.evaluate.batch)
    how, on_path = runtime.config.rollout.sampling, shapes.trees(checkpoints=2, displacement=1)
    name = f"sample to analyse, {section.group} a prompt"
    yield sampling(shapes, name, at_once, section.group, how, on_path)
    at_point = shapes.trees(checkpoints=1, edits=1 + later)
    yield job("gradient", "gradient", at_point | shapes.trees(gradients=section.held - 1), 3, params, rows)
    yield job("activity", "activity", at_point, 1, params, rows)
    crossed = shapes.trees(checkpoints=1, edits=max(later, 1))
    yield job("(u, w) jets", "jets", crossed, 5, params, params, rows)
    at_place = shapes.trees(checkpoints=1, displacement=1)
    spanned = {"Lanczos basis": bytes_a_device(basis), "blocks": bytes_a_device(block)}
    found = {"Lanczos vectors": 3 * bytes_a_device(basis)}
    passes = 2 + 2 * section.lanczos_block
    yield job("Hv on the route", "hessian", at_place | spanned, passes, point, block, rows, fixed, scalar, block)
    on_route = (point, fixed, directions, rows)
    yield job(f"route jets, {DIRECTIONS} directions", "route_jets", at_place | found, 1 + 2 * DIRECTIONS, *on_route)
    step = blocks.programs(block).orthogonalise
    yield Job("Lanczos step", lambda _: step.lower(basis, block, scalar), at_place | shapes.trees(parameters=1))


def taking_back(shapes: Shapes) -> Iterator[Job]:
    """What a rollback runs: evidence by the analysis's programs, scores of coordinates, sets of them, their trial."""
    runtime, config = shapes.runtime, shapes.runtime.config
    params, masks, scalar = shapes.params, shapes.masks(), shapes.array((), F32)
    built, n = probe.build(runtime, config.train.grpo), config.analyze.batch * config.analyze.group
    rows, rules = shapes.rows(n), len(config.recover.rules)
    # Scores that are there when evidence of the domain is asked for: those of the rules before.
    before = max((i for i, rule in enumerate(config.recover.rules) if rule in evidence.NEEDS_DATA), default=0)
    own = 3 * flops.sequences(runtime.model.config, n, shapes.prompt + shapes.new, shapes.new)
    places = {"places": 2 * bytes_a_device(masks)}
    # Arguments of a program are not beside it: of two checkpoints (now, the peak) and two edits, one may be.
    asked = shapes.trees(checkpoints=1, edits=2, displacement=1, scores=before) | places
    gradient = built.programs["gradient"]
    yield Job("gradient", lambda _: gradient.lower(params, rows), asked, n, ROWS, own=lambda _: own)
    squares = squares_program(built.row_log_probs, 1, runtime.shardings)
    told = asked | shapes.trees(gradient=1)
    yield Job("Fisher diagonal", lambda _: squares.lower(params, params, rows), told, n, ROWS, own=lambda _: own)
    given = rollback.Evidence(edit=params, peak_gradient=params, fisher=params, kappa=scalar)
    told = shapes.trees(checkpoints=2, edits=1, displacement=1, scores=rules - 1) | places
    yield Job("rollback scores", lambda _: evidence.PROGRAMS["adding"].lower(given), told)
    count = shapes.array((), I32), shapes.array((), I32)
    tried = shapes.trees(checkpoints=2, edits=1, scores=rules - 1) | {"places": bytes_a_device(masks)}
    halvings = lambda _: (selection.KEY_BITS,)  # noqa: E731
    yield Job("rollback set", lambda _: selection.largest_program.lower(params, count, masks), tried, trips=halvings)
    tried = shapes.trees(checkpoints=1, scores=rules) | places
    yield Job("rollback", lambda _: rollback.taken_back.lower(params, params, masks, scalar), tried)
    held = shapes.trees(checkpoints=2, edits=1, scores=rules) | places | {"set": bytes_a_device(masks)}
    name, evaluated = f"sample scores, {config.recover.samples} a prompt", config.evaluate
    yield sampling(shapes, name, evaluated.batch, config.recover.samples, evaluated.sampling, held)


def _on_route(shapes: Shapes, *leading: int) -> Any:
    """Vectors of the widest route that there can be: `SHARE` of each layer's neurons."""
    config, mesh = shapes.runtime.model.config, shapes.runtime.mesh
    width = math.ceil(SHARE * config.d_mlp)

    def part(sizes: tuple[int, ...], *names: str | None) -> jax.ShapeDtypeStruct:
        sharding = named(mesh, None, *names)
        shape = (*leading, config.n_layers, *sizes)
        return jax.ShapeDtypeStruct(shape, F32, sharding=stacked(sharding) if leading else sharding)

    into = part((config.d_model, width), "embed", None)
    return {"gate": into, "up": into, "down": part((width, config.d_model), None, "embed")}

"""`fit`: compiles every device program of an experiment for a TPU slice, without one, and says whether it fits.

The compiler is the real one (libtpu). Of each program: memory of a device, with what lies there beside it, against what
the chip leaves to programs; operations against the model's own count, which gives what is recomputed; collectives, and
gathers of whole parameters by name; the least time by the chip's published peak and bandwidth; the largest batch.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from rich import box
from rich.table import Table

from mdrl_jax.commands.fit_analysis import analysis, taking_back
from mdrl_jax.commands.fit_programs import Job, Shapes, scoring, supervised, training
from mdrl_jax.config import Config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.model import huggingface, published
from mdrl_jax.model.families import ModelConfig
from mdrl_jax.model.flops import kernel_flops
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel import chips
from mdrl_jax.parallel.chips import Chip
from mdrl_jax.parallel.fit import Compiled, by_kind, compile_for, largest, whole_parameters
from mdrl_jax.parallel.sharding import batch_divisor, make_mesh, over_tensor, param_shardings
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.rl.rollouts import Rollouts
from mdrl_jax.runtime import Runtime, decoder, model_folder
from mdrl_jax.stage import Stage, resolve_stages

GIB = 2.0**30
WIDTH = 150  # of the table: figures side by side


def run(config: Config, topology: str, everything: bool = False, output: str = "screen") -> bool:
    """Prints the table and says whether all programs fit; `output` as in `report/screen/console.py`.

    Raises:
      UserError: without the compiler, for a slice or a model that is not known, and for a mesh that does not match.
    """
    started, chip = time.monotonic(), chips.chip_of(topology)
    stages = resolve_stages(config, tuple(DOMAINS))
    runtime, source = abstract_runtime(config, chips.devices(topology))
    with Screen(None, output) as screen:
        n = runtime.model.config.n_params
        mesh = " x ".join(f"{axis} {size}" for axis, size in runtime.mesh.shape.items())
        screen.print(f"{config.model.path}: {n / 1e9:.2f}B parameters, {source}; {topology}, mesh {mesh}")
        screen.print(runtime.notes[-1])
        for stage in stages:
            if told := not_compiled(stage):
                screen.print(f"stage {stage.name}: {told}")
        made = merged(jobs(Shapes(runtime), stages, everything))
        rows = []
        with screen.steps("fit", len(made)) as show:
            for done, job in enumerate(made):
                show(done, job.name)
                rows.append(fitted(job, runtime, chip))
                screen.event("program", topology=topology, model=config.model.path, **rows[-1])
        screen.print(table(rows, chip, topology), moved(rows))
        for row in rows:
            for text in row["whole_parameters"]:
                screen.print(f"{row['program']}: gathers the whole parameter {text}")
        screen.print(verdict(rows, topology), final=True)
        screen.event("done", seconds=time.monotonic() - started, fits=all(row["fits"] for row in rows))
    return all(row["fits"] for row in rows)


def abstract_runtime(config: Config, devices: Sequence[Any]) -> tuple[Runtime, str]:
    """A runtime of shapes alone on the slice's devices, without prompts and rewards; and where its sizes are from."""
    mesh = make_mesh(config.mesh, list(devices))
    sizes, source = _sizes(config.model.path)
    parts = batch_divisor(mesh)
    if config.evaluate.batch % parts:
        raise UserError(f"evaluate.batch={config.evaluate.batch} is not divisible by the mesh's data * fsdp = {parts}")
    model = decoder(config, sizes, mesh)
    boxed = param_shapes(model)
    none: Any = None
    runtime = Runtime(
        config=config,
        mesh=mesh,
        model=model,
        tokenizer=none,
        shapes=nn.unbox(boxed),
        shardings=param_shardings(mesh, boxed),
        domains={},
        prompts={},
        rollouts=Rollouts(model, mesh, none, (0,), config.rollout, none, config.rewards.max_error_share),
        notes=(f"attention of training, log-probs and prefill: {model.attention.__name__}",),
    )
    return runtime, source


def _sizes(path: str) -> tuple[ModelConfig, str]:
    folder = model_folder(path)
    if folder.is_dir():
        return huggingface.read_config(folder), f"sizes of {folder}"
    return published.sizes(path), "sizes as published"


def jobs(shapes: Shapes, stages: Sequence[Stage], everything: bool) -> Iterator[Job]:
    """The programs of the stages in order, and with `everything` those of kinds of stages that are not among them."""
    trained = [s for s in stages if s.kind == "grpo"]
    n = len({s.domains[0] for s in trained if not s.prefix})
    for stage in stages:
        if stage.kind == "grpo":
            yield from training(shapes, stage)
        if stage.scored:
            yield from scoring(shapes)
    kinds = {s.kind for s in stages}
    if "sft" in kinds or everything:
        yield from supervised(shapes)
    if "analyze" in kinds or everything:
        yield from analysis(shapes, n)
    if "rollback" in kinds or everything:
        yield from taking_back(shapes)


def not_compiled(stage: Stage) -> str:
    """What of a stage is left out; "" if nothing is."""
    if stage.kind in ("merge", "plan", "trials", "orders", "recover"):
        return "its own arithmetic on parameters is not compiled"
    if stage.kind == "grpo" and stage.train.prevent.transforms:
        return "its step, with what it adds to the optimizer, is not compiled"
    return ""


def merged(found: Iterable[Job]) -> list[Job]:
    """One job of each name: the one with more beside it."""
    by_name: dict[str, Job] = {}
    for job in found:
        before = by_name.get(job.name)
        if before is None or sum(job.beside.values()) > sum(before.beside.values()):
            by_name[job.name] = job
    return list(by_name.values())


def fitted(job: Job, runtime: Runtime, chip: Chip) -> dict[str, Any]:
    """Compiles a job, and the sizes around it, and says what it asks for, JSON-able."""

    def compile_at(size: int) -> Compiled:
        with jax.set_mesh(runtime.mesh):
            return compile_for(lambda: job.lower(size), job.trips(size), kernel_flops)

    compiled, beside = compile_at(job.size), sum(job.beside.values())
    room, started = chip.gib * GIB - beside, time.monotonic()
    fits, best = compiled.bytes <= room, None
    if job.most:
        unit = batch_divisor(runtime.mesh)
        sizes = lambda size: compile_at(size).bytes  # noqa: E731
        best = largest(sizes, room, unit, job.most, {job.size: compiled.bytes})
    own = job.own(job.size) / runtime.mesh.size if job.own else None
    refused = "refused" in compiled.memory
    params = Shapes(runtime).params
    return {
        "program": job.name,
        "size": job.size,
        "of": job.what,
        "gib": compiled.bytes / GIB,
        "memory_gib": {k: v / GIB for k, v in compiled.memory.items()},
        "beside_gib": {k: v / GIB for k, v in job.beside.items()},
        "kv_gib": job.kv_bytes(job.size) / GIB if job.kv_bytes else None,
        "available_gib": chip.gib,
        "fits": fits,
        "flops": None if refused else compiled.flops,
        "own_flops": own,
        "recomputation": compiled.flops / own if own and not refused else None,
        "traffic": None if refused else compiled.traffic,
        "collectives": {k: {"bytes": b, "times": n} for k, (b, n) in by_kind(compiled.collectives).items()},
        "whole_parameters": whole_parameters(compiled, params, over_tensor),
        "roofline_seconds": None if refused else compiled.roofline(chip),
        "largest": best,
        "compile_seconds": compiled.seconds,
        "search_seconds": time.monotonic() - started if job.most else None,
    }


def table(rows: Sequence[dict[str, Any]], chip: Chip, topology: str) -> Table:
    """A row a program, figures of one device."""
    shown = Table(
        box=box.SIMPLE,
        title_justify="left",
        title=f"{topology}: {chip.gib:g} of {chip.published_gib:g} GiB a device are left to programs",
        width=WIDTH,
    )
    shown.add_column("program")
    headings = (
        "size",
        "GiB",
        "beside",
        "sum",
        "KV",
        "fits",
        "TFLOP",
        "x own",
        "GB moved",
        "least s",
        "largest",
        "compile s",
    )
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        beside = sum(row["beside_gib"].values())
        shown.add_row(
            row["program"],
            f"{row['size']}" if row["of"] else "",
            f"{row['gib']:.2f}",
            f"{beside:.2f}",
            f"{row['gib'] + beside:.2f}",
            _number(row["kv_gib"], ".2f"),
            "yes" if row["fits"] else "NO",
            _number(row["flops"], ".3g", 1e12),
            _number(row["recomputation"], ".2f"),
            _number(row["traffic"], ".3g", 1e9),
            _number(row["roofline_seconds"], ".3g"),
            _number(row["largest"], "d"),
            f"{row['compile_seconds']:.0f}",
            style="" if row["fits"] else "red",
        )
    return shown


def moved(rows: Sequence[dict[str, Any]]) -> Table:
    """Collectives of each program by kind: GB a call and how often."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["collectives"]))
    shown = Table(box=box.SIMPLE, title_justify="left", title="collectives of a call, GB (times)", width=WIDTH)
    shown.add_column("program")
    for kind in kinds:
        shown.add_column(kind, justify="right")
    for row in rows:
        cells = (row["collectives"].get(kind) for kind in kinds)
        shown.add_row(row["program"], *(f"{c['bytes'] / 1e9:.3g} ({c['times']})" if c else "" for c in cells))
    return shown


def verdict(rows: Sequence[dict[str, Any]], topology: str) -> str:
    """The last line."""
    bad = [row["program"] for row in rows if not row["fits"]]
    if not bad:
        return f"all {len(rows)} programs fit {topology}"
    return f"{len(bad)} of {len(rows)} programs do not fit {topology}: {'; '.join(bad)}"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit if unit != 1 else value, form)

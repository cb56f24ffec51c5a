"""The command `fit`: compiles every device program of an experiment for a TPU slice and checks that it fits in memory.

It needs no TPU, because libtpu, the compiler that TPU machines use, also runs without one. For each program it reports:

- the memory of one device for the program and for the arrays that are held beside it, and whether the chip has as much;
- the FLOPs, and their ratio to the model's own count; a ratio above 1 is recomputation;
- collectives, and every parameter that is gathered whole;
- the shortest possible time by the chip's published peak FLOPs and memory bandwidth;
- the largest batch that fits.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from rich import box
from rich.table import Table

from mdrl_jax.analysis import samples
from mdrl_jax.commands.fit_analysis import analysis, circuits, taking_back
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
from mdrl_jax.stages import grpo, rollback, sft

GIB = 2.0**30
WIDTH = 150  # width of the tables in characters, which all columns need


def run(config: Config, topology: str, everything: bool = False, output: str = "screen") -> bool:
    """Compiles the programs and prints the tables.

    `chips.compiler_alone` has to be called first, before JAX is imported.

    Args:
      config: the whole configuration, parsed.
      topology: the TPU slice, e.g. "v5e:4x4".
      everything: also compile programs of kinds of stages that the config does not list.
      output: form of the standard output: "screen", "quiet" or "json" (`report/screen/console.py`).

    Returns:
      Whether all programs fit; True if there is no program.

    Raises:
      UserError: if the compiler is not installed or the slice is not known; if the stages of the config are not valid
        (`stage.resolve_stages`); if model, mesh and slice do not fit together (`abstract_runtime`); if a run would
        refuse the sizes of a stage (`check`); or if `rollout.cache_gib` has no room for one prompt with all its
        completions.
      KeyError: if `output` is no form of output.
      jax.errors.JaxRuntimeError, ValueError, RuntimeError: as in `fitted`.
    """
    started, chip = time.monotonic(), chips.chip_of(topology)
    stages = resolve_stages(config, tuple(DOMAINS))
    runtime, source = abstract_runtime(config, chips.devices(topology))
    check(runtime, stages, everything)
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
    """Makes a runtime that has shapes but no arrays, to compile with.

    Args:
      config: the whole configuration. `model.path` is "tiny", a Hugging Face folder, or, if there is no such folder,
        the name of a published model (`published.sizes`).
      devices: the devices of the slice. The mesh takes all of them; none of them runs anything.

    Returns:
      (runtime, source). The runtime has config, mesh, model, `shapes`, `shardings` and one note, about the attention.
      Its tokenizer and its reward pool are None, `domains` and `prompts` are empty, so it can neither sample nor score.
      The source of the model's sizes is a text: "sizes of FOLDER" or "sizes as published".

    Raises:
      UserError: if `model.path` is neither a folder nor a known published model; if the folder's config.json is absent,
        damaged or not supported; if the mesh does not match the devices; if it does not divide `evaluate.batch` or a
        parameter; if prompt and completion together may be longer than the model allows; or if `rollout.cache_gib` has
        no room for one prompt with one completion.
    """
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


def check(runtime: Runtime, stages: Sequence[Stage], everything: bool) -> None:
    """Refuses stages with the errors with which a run refuses them, as far as these need no data (`experiment.run`).

    Args:
      runtime: model, mesh and configuration.
      stages: the stages of the run.
      everything: also check the programs of supervised stages and of the analysis if there is no such stage.

    Raises:
      UserError: if the mesh does not divide the rows or the prompts of a batch; if a supervised stage has rows that are
        longer than the model allows; if a device has no room for the completions of one prompt; or if a rollback has an
        unknown rule.
    """
    for stage in stages:
        if stage.kind == "grpo":
            grpo.check_divides(runtime, stage)
            if stage.train.prevent.transforms or stage.prefix == "alternate":
                samples.check(runtime, (), f"stage {stage.name}: ")
        elif stage.kind == "sft":
            sft.check_sizes(runtime, stage.sft, f"stage {stage.name}: ")
        elif stage.kind == "rollback":
            rollback.check(runtime)
    kinds = {stage.kind for stage in stages}
    if everything and "sft" not in kinds:
        sft.check_sizes(runtime, runtime.config.sft)
    if everything or kinds & {"analyze", "circuits", "locality", "rollback"}:
        samples.check(runtime, ())


def _sizes(path: str) -> tuple[ModelConfig, str]:
    name = path.removeprefix("hub:").partition("@")[0]
    if path != name and name.rpartition("/")[2] in published.PUBLISHED:  # a known model of the hub is not downloaded
        return published.sizes(name), "sizes as published"
    folder = model_folder(path)
    if folder.is_dir():
        return huggingface.read_config(folder), f"sizes of {folder}"
    return published.sizes(path), "sizes as published"


def jobs(shapes: Shapes, stages: Sequence[Stage], everything: bool) -> Iterator[Job]:
    """Yields the programs of the stages.

    First come those of GRPO stages (`training`) and of scores (`scoring`), in the order of the stages. Then come those
    of supervised stages (`supervised`), of the analysis (`analysis`), of circuits (`circuits`) and of rollbacks
    (`taking_back`), once each, for the kinds that occur. Several jobs may have the same name (`merged`).

    Args:
      shapes: shapes of the programs' arguments.
      stages: the stages of the run.
      everything: also yield the programs of supervised stages, `analyze` and rollbacks if there is no such stage.

    Raises:
      UserError: when a job is asked for, if `rollout.cache_gib` has no room for one prompt with all its completions.
    """
    trained = [s for s in stages if s.kind == "grpo"]
    n = len({s.domains[0] for s in trained if not s.prefix})
    for stage in stages:
        if stage.kind == "grpo":
            yield from training(shapes, stage)
        if stage.scored:
            yield from scoring(shapes)
    kinds = {s.kind for s in stages}
    if "sft" in kinds or everything:
        yield from supervised(shapes, [s.sft for s in stages if s.kind == "sft"] or [shapes.runtime.config.sft])
    if kinds & {"analyze", "locality"} or everything:
        yield from analysis(shapes, n)
    if "circuits" in kinds:
        yield from circuits(shapes)
    if "rollback" in kinds or everything:
        yield from taking_back(shapes)


def not_compiled(stage: Stage) -> str:
    """A text, without the stage's name, about the part of a stage that `fit` does not compile; "" if there is none.

    Such parts are the programs of merges, plans, trials, orders and recoveries, the gradients at the ends of an
    alternating refresh, and the training step of a GRPO stage with EWC, A-GEM, PCGrad, MGS or `protect`.
    """
    if stage.kind in ("merge", "plan", "trials", "orders", "recover"):
        return "the programs that combine or forecast parameters are not compiled"
    if stage.prefix == "alternate":
        return "the gradients at its two ends are not compiled; they are those of the analysis"
    if stage.kind == "grpo" and stage.train.prevent.transforms:
        return "its training step is not compiled, because prevention methods change it"
    return ""


def merged(found: Iterable[Job]) -> list[Job]:
    """Keeps one job of each name: the one with the most memory held beside it (`Job.beside`), the first of equal ones.

    The order of the list is that in which the names first occur. Without jobs it is empty.
    """
    by_name: dict[str, Job] = {}
    for job in found:
        before = by_name.get(job.name)
        if before is None or sum(job.beside.values()) > sum(before.beside.values()):
            by_name[job.name] = job
    return list(by_name.values())


def fitted(job: Job, runtime: Runtime, chip: Chip) -> dict[str, Any]:
    """Compiles a program at its configured size and finds the largest size that fits.

    Args:
      job: the program; the mesh has to divide its rows or prompts (`check`).
      runtime: model, mesh and configuration.
      chip: memory, peak FLOPs and bandwidth of a device.

    Returns:
      The program's record for the event `program`. All figures are those of one device and one call. None is a figure
      that the program does not have, or that the compiler does not give because it refused the program.
      - "program", "size", "of": name, configured size, and the unit of the size; 0 and "" if it has no size.
      - "gib", "memory_gib": memory of the program in GiB, in all and by part (`parallel.fit.Compiled`); infinite if the
        compiler refused the program without stating it.
      - "beside_gib", "kv_gib", "available_gib": GiB of other arrays by name, of the KV cache, and of the device.
      - "fits": whether the program and the arrays beside it fit.
      - "flops", "own_flops", "recomputation": FLOPs of the program, by the model's own count, and their ratio.
      - "traffic": bytes to and from memory.
      - "collectives": by kind {"bytes", "times"}. "whole_parameters": a text on each parameter that is gathered whole.
      - "roofline_seconds": the shortest possible time.
      - "largest": the largest size that fits, of the multiples of the mesh's data * fsdp up to `job.most`; 0 if none
        does, None if `job.most` is 0.
      - "compile_seconds", "search_seconds": time of compiling at the configured size, and of finding the largest.

    Raises:
      jax.errors.JaxRuntimeError: if compiling fails for another reason than memory.
      ValueError: if a loop has an unknown number of iterations (`parallel.fit.compile_for`).
      RuntimeError: as in `parallel.fit.compile_for`.
    """

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
    """The main table: one row for each program; the figures are those of one device and one call.

    Columns: "GiB" is the memory of the program, "held beside" that of other arrays meanwhile, "sum" both, and "KV" the
    part that is the KV cache, all in GiB. "fits" is "yes" or "NO". "TFLOP" is 10^12 FLOPs, and "x own FLOP" the
    program's FLOPs over the model's own count. "GB moved" is traffic to and from memory in 10^9 bytes, "least s" the
    shortest possible time, "largest" the largest size that fits, and "compile s" the time of compiling. A figure that
    the program does not have is empty. A program that does not fit is red.

    Args:
      rows: the records of the programs (`fitted`).
      chip: memory of a device.
      topology: name of the slice, for the title.

    Returns:
      The table, in the order of `rows`.
    """
    shown = Table(
        box=box.SIMPLE,
        title_justify="left",
        title=f"{topology}: programs can use {chip.gib:g} of the {chip.published_gib:g} GiB of a device",
        width=WIDTH,
    )
    shown.add_column("program")
    headings = (
        "size",
        "GiB",
        "held beside",
        "sum",
        "KV",
        "fits",
        "TFLOP",
        "x own FLOP",
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
    """The table of collectives: one row for each program, and one column for each kind that occurs in any of them.

    A cell is "GB (count)": 10^9 bytes of one device in one call of the program, and how often collectives of this kind
    run in it. It is empty if the program has none.

    Args:
      rows: the records of the programs (`fitted`).
    """
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["collectives"]))
    shown = Table(box=box.SIMPLE, title_justify="left", title="collectives of one call: GB (count)", width=WIDTH)
    shown.add_column("program")
    for kind in kinds:
        shown.add_column(kind, justify="right")
    for row in rows:
        cells = (row["collectives"].get(kind) for kind in kinds)
        shown.add_row(row["program"], *(f"{c['bytes'] / 1e9:.3g} ({c['times']})" if c else "" for c in cells))
    return shown


def verdict(rows: Sequence[dict[str, Any]], topology: str) -> str:
    """The last line, without a line break: that all programs fit, or how many of them do not, with their names.

    Args:
      rows: the records of the programs (`fitted`).
      topology: name of the slice.
    """
    bad = [row["program"] for row in rows if not row["fits"]]
    if not bad:
        return f"all {len(rows)} programs fit {topology}"
    return f"{len(bad)} of {len(rows)} programs do not fit {topology}: {'; '.join(bad)}"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit if unit != 1 else value, form)

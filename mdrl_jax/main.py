"""`mdrl [COMMAND] --flags`, or `python -m mdrl_jax.main`: parses the flags and calls the command.

Without a COMMAND, flags belong to `run`; without anything, the commands are listed.

`COMMANDS` lists every command with its flags. `commands/` and `experiment.py` hold the code that runs once the flags
are parsed. An error that the user can put right is one line on standard error, with exit status 2.
"""

import contextlib
import functools
import gc
import os
import platform
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from absl import flags

import mdrl_jax
from mdrl_jax import command_line
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import preemption

OUTPUTS = ("screen", "quiet", "json")  # the keys of `report/screen/outputs.py`, which is slow to import


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Keeps the garbage collector off. It would look through all that imports make, again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def import_run() -> Any:
    """Imports what a run needs, as the command does, and returns the module `mdrl_jax.experiment`."""
    with _importing():
        from mdrl_jax import experiment
    return experiment


def _run(values: Any) -> None:
    _join(values)
    experiment = import_run()
    from mdrl_jax import config

    workdir = values.workdir or os.path.join("runs", _stem(values["config"].config_filename))
    experiment.run(config.parse(values.config), workdir, values.output)


def _stem(config_file: str) -> str:
    return os.path.splitext(os.path.basename(config_file))[0]


def _run_flags(values: flags.FlagValues, argv: list[str]) -> None:
    command_line.config_flag(values, argv)
    flags.DEFINE_string(
        "workdir",
        None,
        "work folder of the run, new or to be continued; default: runs/NAME for the config file NAME.py",
        flag_values=values,
    )
    _output_flag(values)
    _hosts_flags(values)


def _generate(values: Any) -> None:
    from mdrl_jax.commands import generate

    generate.run(
        model=values.model,
        workdir=values.workdir,
        stage=values.stage,
        prompt=values.prompt,
        prompt_ids=values.prompt_ids,
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        seed=values.seed,
        raw=values.raw,
        system=values.system,
        messages=values.messages,
        base=values.base,
    )


def _generate_flags(values: flags.FlagValues, argv: list[str]) -> None:
    string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    string("model", None, 'Hugging Face folder of the model, or "tiny" for the one of the package', flag_values=values)
    string("workdir", None, "work folder of a run, instead of --model; needs --stage", flag_values=values)
    string("stage", None, "stage of that run whose final parameters are used, e.g. math", flag_values=values)
    about = "text of the prompt: the user's message if the model has a chat template, else the bare text"
    string("prompt", None, about, flag_values=values)
    flags.DEFINE_bool("raw", False, "take --prompt as bare text, without the chat template", flag_values=values)
    string("system", None, "system prompt of the chat", flag_values=values)
    about = 'file with several turns: a JSON list of {"role", "content"}, or one such object a line'
    string("messages", None, about, flag_values=values)
    _base_flag(values)
    string("prompt_ids", None, "token ids of the prompt, instead of --prompt, e.g. 1,2,3", flag_values=values)
    most = "largest number of tokens to generate; default: 128, or what the model's length allows"
    integer("max_new_tokens", None, most, lower_bound=1, flag_values=values)
    number("temperature", 1.0, "sampling temperature; 0: the likeliest token", lower_bound=0.0, flag_values=values)
    number(
        "top_p", 1.0, "sample from the likeliest tokens that together have this probability; 1: all", flag_values=values
    )
    integer("top_k", 0, "sample from this many of the likeliest tokens; 0: all", lower_bound=0, flag_values=values)
    most = 2**63 - 1
    integer("seed", 0, "seed of the sampling", lower_bound=-most, upper_bound=most, flag_values=values)
    _cache_flag(values)


def _evaluate(values: Any) -> None:
    _join(values)
    from mdrl_jax import config
    from mdrl_jax.commands import evaluate

    parsed = config.parse(values.config)
    if values.dry_run:
        evaluate.dry_run(values.model or parsed.model.path, parsed, values.output, values.base)
        return
    model, folders = _needed(values, "model"), (values.out or "", values.before or "")
    evaluate.run(model, parsed, values.output, *folders, base=values.base, tasks=values.tasks)


def _evaluate_flags(values: flags.FlagValues, argv: list[str]) -> None:
    command_line.config_flag(values, argv)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    text("model", None, "Hugging Face folder of the model to score")
    text("out", None, "folder for the rewards of all prompts, the scores and all completions")
    text("before", None, "folder that an earlier call wrote as --out: shows which answers were lost and gained since")
    text("tasks", None, "results of lm-evaluation-harness on the same model, shown beside: a JSON file or its folder")
    about = "look up every data set of the config, count its rows and show a prompt; score nothing"
    flags.DEFINE_bool("dry_run", False, about, flag_values=values)
    _base_flag(values)
    _output_flag(values)
    _hosts_flags(values)


def _analyze(values: Any) -> None:
    _join(values)
    from mdrl_jax import config
    from mdrl_jax.commands import analyze

    if not values.stage:
        raise UserError("--stage is missing; name every stage in order, e.g. --stage=code:DIR --stage=math:DIR")
    base, workdir = (_needed(values, name) for name in ("base", "workdir"))
    command = analyze.circuits if values.circuits else analyze.run
    command(base, values.stage, config.parse(values.config), workdir, values.output)


def _analyze_flags(values: flags.FlagValues, argv: list[str]) -> None:
    command_line.config_flag(values, argv)
    flags.DEFINE_string("base", None, "Hugging Face folder that the first stage was trained from", flag_values=values)
    about = (
        "DOMAIN:FOLDER, the domain that a stage trained and the Hugging Face folder at its end; repeat the flag in the "
        "order of training; solo-DOMAIN:FOLDER is a stage that was trained from --base directly; a folder may be a "
        "LoRA adapter (PEFT layout) on --base"
    )
    flags.DEFINE_multi_string("stage", [], about, flag_values=values)
    about = (
        "compare the attention heads that each model needs: --stage=DOMAIN:FOLDER is then a model that RL trained from "
        "--base, and sft-DOMAIN:FOLDER one that supervised training did"
    )
    flags.DEFINE_bool("circuits", False, about, flag_values=values)
    flags.DEFINE_string("workdir", None, "work folder that the results are written to", flag_values=values)
    _output_flag(values)
    _hosts_flags(values)


def _rollback(values: Any) -> None:
    from mdrl_jax import config
    from mdrl_jax.commands import rollback

    rollback.run(
        **{name: _needed(values, name) for name in ("model", "before", "after", "keep", "out")},
        fraction=values.fraction,
        strength=values.strength,
        rule=values.rule,
        base=values.base,
        config=None if values.config is None else config.parse(values.config),
        domain=values.domain,
        output=values.output,
    )


def _rollback_flags(values: flags.FlagValues, argv: list[str]) -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_float
    command_line.config_flag(values, argv)
    text("model", None, "Hugging Face folder of the model to change", flag_values=values)
    text("before", None, "folder of the model before the training that did the damage", flag_values=values)
    text(
        "after", None, "folder after that training; part of the edit, after - before, is subtracted", flag_values=values
    )
    text("keep", None, "folder of the model at the peak of the domain to restore", flag_values=values)
    text("out", None, "new folder that the result is written to", flag_values=values)
    number(
        "fraction",
        0.001,
        "share of all parameters that is changed, those with the highest scores; 1 subtracts the whole edit",
        flag_values=values,
    )
    number("strength", 1.0, "factor on the subtracted edit, above 0; 1 undoes it completely", flag_values=values)
    about = (
        "how parameters are scored: displacement, magnitude, opposition (needs --base), adding or removing (both need "
        "--config and --domain)"
    )
    text("rule", "displacement", about, flag_values=values)
    text(
        "base",
        None,
        "folder of the model that --keep was trained from, and of the base of LoRA adapters",
        flag_values=values,
    )
    text("domain", None, "domain of the config that is to be restored", flag_values=values)
    _output_flag(values)
    _cache_flag(values)


def _distill(values: Any) -> None:
    from mdrl_jax.commands import distill

    student, out = (_needed(values, name) for name in ("student", "out"))
    distill.run(student, values.teacher, values.config, out, values.workdir, values.output, values.base)


def _distill_flags(values: flags.FlagValues, argv: list[str]) -> None:
    command_line.config_flag(values, argv)
    text = flags.DEFINE_string
    text("student", None, "Hugging Face folder of the model to train", flag_values=values)
    about = (
        "DOMAIN:FOLDER, a domain to win back and the Hugging Face folder of a model that is good at it; repeat the "
        "flag for every domain"
    )
    flags.DEFINE_multi_string("teacher", [], about, flag_values=values)
    text("base", None, "folder of the base model of a student or teachers that are LoRA adapters", flag_values=values)
    text("out", None, "new folder that the result is written to", flag_values=values)
    about = "work folder for the scores of the steps and TensorBoard, new or to be continued; default: OUT-run"
    text("workdir", "", about, flag_values=values)
    _output_flag(values)
    _cache_flag(values)


def _export(values: Any) -> None:
    from mdrl_jax.commands import export

    export.run(_needed(values, "workdir"), _needed(values, "stage"), _needed(values, "out"))


def _export_flags(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("workdir", None, "work folder of a run", flag_values=values)
    flags.DEFINE_string("stage", None, "stage whose final parameters are exported, e.g. cw", flag_values=values)
    flags.DEFINE_string("out", None, "new folder that the model is written to", flag_values=values)


def _push(values: Any) -> None:
    from mdrl_jax.commands import push

    push.run(_needed(values, "model"), _needed(values, "repo"), values.private, values.dry_run)


def _push_flags(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("model", None, "Hugging Face folder of the model to upload", flag_values=values)
    flags.DEFINE_string("repo", None, "OWNER/NAME of the repository on the hub, made if needed", flag_values=values)
    flags.DEFINE_bool("private", False, "make a new repository private", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "list the files and send nothing", flag_values=values)


def _score(values: Any) -> int:
    from mdrl_jax.commands import score

    return 2 if score.run(_needed(values, "domain"), _needed(values, "input")) else 0


def _score_flags(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("domain", None, "domain whose reward is used: math, code, qa or cw", flag_values=values)
    flags.DEFINE_string(
        "input",
        None,
        'file with a JSON object a line. math: {"completion": "The answer is 4", "answer": 4}; qa: the same, where the '
        'answer may be a list, and "choices" may be added; code: {"completion": "def f(): ...", "tests": '
        '["assert f()"]}, or "cases": [{"stdin": "1", "stdout": "2"}]; cw: {"completion": "a b", "constraints": '
        '[{"kind": "word_count", "count": 2}]}',
        flag_values=values,
    )


def _seeds(values: Any) -> None:
    from mdrl_jax.commands import seeds

    if not values.workdir:
        raise UserError("--workdir is missing; name the work folder of every seed, e.g. --workdir=A --workdir=B")
    seeds.run(values.workdir, values.out, values.plot)


def _seeds_flags(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "work folder of the run with one seed; repeat the flag for every seed", flag_values=values
    )
    flags.DEFINE_string("out", None, "JSON file that the table is also written to", flag_values=values)
    about = "PNG file for a plot of predicted against measured damage, or of runs of configs/locality.py"
    flags.DEFINE_string("plot", None, about, flag_values=values)


def _report(values: Any) -> None:
    from mdrl_jax.commands import report

    report.run(_needed(values, "workdir"))


def _report_flags(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("workdir", None, "work folder of a run, finished or not", flag_values=values)


def _fit(values: Any) -> int:
    from mdrl_jax import config
    from mdrl_jax.commands import fit

    fits = fit.run(config.parse(values.config), _needed(values, "topology"), values.all, values.output)
    return 0 if fits else 1


def _fit_flags(values: flags.FlagValues, argv: list[str]) -> None:
    from mdrl_jax.parallel import chips

    chips.compiler_alone()  # must run before a config file imports JAX
    command_line.config_flag(values, argv)
    flags.DEFINE_string("topology", None, "TPU slice to compile for, e.g. v5e:4x4 or v5p:2x2x2", flag_values=values)
    flags.DEFINE_bool(
        "all",
        False,
        "also compile the programs of sft, analyze and rollback if no stage uses them",
        flag_values=values,
    )
    _output_flag(values)


def _bench(values: Any) -> None:
    from mdrl_jax.commands import bench
    from mdrl_jax.runtime import model_folder

    sizes = bench.curvature.Sizes(layers=values.layers, width=values.width, rows=values.rows)
    folder = model_folder(values.model)
    work = bench.Work(folder, values.prompts, values.group, values.length, values.prompt)
    bench.run(values.names, values.repeats, bench.Given(sizes, work))


def _bench_flags(values: flags.FlagValues, argv: list[str]) -> None:
    values.set_gnu_getopt()  # flags may follow names
    flags.DEFINE_list(
        "names", [], "benchmarks to run; --names= may be left out: bench step; default: all", flag_values=values
    )
    integer = flags.DEFINE_integer
    integer("repeats", 10, "number of timed rounds", lower_bound=2, flag_values=values)
    about = "step, decode, train: Hugging Face folder of the model, or tiny for the one that comes with the package"
    flags.DEFINE_string("model", "tiny", about, flag_values=values)
    integer("prompts", 4, "step, decode, train: number of prompts", lower_bound=1, flag_values=values)
    integer("group", 16, "step, decode, train: completions of each prompt", lower_bound=2, flag_values=values)
    integer("length", 64, "step, decode, train: tokens of each completion", lower_bound=1, flag_values=values)
    integer("prompt", 32, "step, decode, train: tokens of each prompt", lower_bound=1, flag_values=values)
    integer("layers", 6, "curvature: number of layers of the model", lower_bound=1, flag_values=values)
    about = "curvature: embedding size of the model, a multiple of 32"
    integer("width", 256, about, lower_bound=32, flag_values=values)
    integer("rows", 32, "curvature: number of sequences in a batch", lower_bound=1, flag_values=values)


def _fields(values: Any) -> None:
    from mdrl_jax.report.screen import fields

    fields.run(values.names)


def _fields_flags(values: flags.FlagValues, argv: list[str]) -> None:
    values.set_gnu_getopt()
    about = "words of which a field's path or explanation has all; --names= may be left out: config learning rate"
    flags.DEFINE_list("names", [], about, flag_values=values)


def _base_flag(values: flags.FlagValues) -> None:
    about = "Hugging Face folder of the base model, if --model is a LoRA adapter (PEFT layout)"
    flags.DEFINE_string("base", None, about, flag_values=values)


def _cache_flag(values: flags.FlagValues) -> None:
    about = "folder for compiled programs, which later commands find there; off: none; default: in the user's cache"
    flags.DEFINE_string("compilation_cache", None, about, flag_values=values)


def _output_flag(values: flags.FlagValues) -> None:
    about = "what standard output shows: text and progress bars, only the final lines, or one JSON object per line"
    flags.DEFINE_enum("output", OUTPUTS[0], OUTPUTS, about, flag_values=values)


def _hosts_flags(values: flags.FlagValues) -> None:
    """Flags of commands that run on several hosts; on a TPU pod and under SLURM, JAX knows their values."""
    integer = flags.DEFINE_integer
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0; give it on every host, except on a TPU pod and under SLURM, where none is needed",
        flag_values=values,
    )
    integer("processes", None, "number of processes; 1: this host alone", lower_bound=1, flag_values=values)
    integer("process_id", None, "index of this process, from 0", lower_bound=0, flag_values=values)
    about = "seconds without a sign of life from one host after which the run ends on all hosts"
    flags.DEFINE_float("host_timeout", 300.0, about, lower_bound=5.0, flag_values=values)
    _cache_flag(values)


def _join(values: Any) -> None:
    from mdrl_jax.parallel import distributed

    distributed.initialize(values.coordinator, values.processes, values.process_id, values.host_timeout)


Command = tuple[str, Callable[[flags.FlagValues, list[str]], None], Callable[[Any], int | None]]
COMMANDS: dict[str, Command] = {
    "run": ("runs the stages of an experiment, or continues where it stopped", _run_flags, _run),
    "generate": ("prints one completion of a prompt", _generate_flags, _generate),
    "evaluate": ("scores a Hugging Face model on the config's domains", _evaluate_flags, _evaluate),
    "analyze": ("analyses why training made a domain worse, for any checkpoints", _analyze_flags, _analyze),
    "distill": ("trains a model on what teachers say about its own completions", _distill_flags, _distill),
    "rollback": ("subtracts part of an edit from a model, without training", _rollback_flags, _rollback),
    "export": ("writes the parameters of a stage as a Hugging Face folder", _export_flags, _export),
    "push": ("uploads a written model to the Hugging Face hub", _push_flags, _push),
    "score": ("computes the rewards of completions in a file", _score_flags, _score),
    "fit": ("compiles every device program for a TPU slice, without a TPU", _fit_flags, _fit),
    "report": ("writes the report page and figures of a work folder", _report_flags, _report),
    "seeds": ("combines runs with several seeds into means with intervals", _seeds_flags, _seeds),
    "config": ("prints the fields of a config with default and meaning: config [WORDS]", _fields_flags, _fields),
    "bench": ("runs the benchmarks, beside other libraries if these are installed", _bench_flags, _bench),
}
STOPS = ("run", "evaluate", "analyze")  # commands that stop in order after a signal; other commands end at once
NEEDS_NO_CONFIG = ("rollback",)  # commands that work without --config
POSITIONAL = {"bench": "names", "config": "names"}  # command -> the list flag that its arguments without -- belong to


def _fields_help() -> str:
    from mdrl_jax.report.screen import fields

    return (
        "Fields of the config, to be set as --config.FIELD=VALUE; mdrl config WORDS searches them:\n\n" + fields.text()
    )


def _needed(values: Any, name: str) -> Any:
    if getattr(values, name) is None:
        raise UserError(f"--{name} is missing; see --helpshort")
    return getattr(values, name)


def _usage() -> str:
    lines = ["usage: mdrl COMMAND --flags, or python -m mdrl_jax.main COMMAND --flags; run may be left out", ""]
    lines += [f"  {name:10} {about}" for name, (about, _, _) in COMMANDS.items()]
    lines += [
        "",
        "COMMAND --helpshort lists its flags; --help also the fields of --config; --version prints the version",
    ]
    lines += ["configs that come with the package: " + ", ".join(command_line.shipped())]
    return "\n".join([*lines, "a first run, of six minutes: mdrl --config=quickstart"])


def main(argv: list[str] | None = None) -> int:
    """Runs one command. An error that the user can put right goes to standard error as one line.

    Args:
      argv: name of the program and its arguments; `sys.argv` by default. The first argument names the command; if it is
        missing or begins with `-`, the command is `run`.

    Returns:
      The exit status: 0 done, or help was printed; 2 an error that the user can put right (a UserError or an OSError),
      or lines without a reward in the file of `score`; 143 stopped by SIGTERM and 130 by Ctrl-C; 1 if `fit` finds a
      program that does not fit, or if standard output was closed. If an error ends a command that runs in several
      processes, the function does not return: it ends the process with status 2 for an error that the user can put
      right, 75 if another host was lost, and 1 otherwise.

    Raises:
      Exception: if a command in a single process fails with an error that is neither a UserError nor an OSError, such
        as a fault of this package.
    """
    argv = sys.argv if argv is None else argv
    # transformers warns if torch is missing, but only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    name, rest = "run", argv[1:]
    if rest and not rest[0].startswith("-"):
        name, rest = rest[0], rest[1:]
    wants_help = {"--help", "--helpshort", "--helpfull", "-h"} & set(rest)
    if name == "help" or not argv[1:] or (wants_help and argv[1].startswith("-")):
        print(_usage())
        return 0
    if "--version" in rest or name == "version":
        print(f"mdrl_jax {mdrl_jax.__version__}, jax {metadata.version('jax')}, Python {platform.python_version()}")
        return 0
    try:
        _check_machine()
        if name not in COMMANDS:
            raise UserError(f"command {name!r} is not known; known: {', '.join(COMMANDS)}")
        about, define, execute = COMMANDS[name]
        values = flags.FlagValues()
        given = [command_line.at_home(a) for a in rest]
        argv = [f"mdrl {name}", *(given if wants_help else command_line.with_shipped(given))]
        define(values, argv)
        if wants_help:
            own = values.get_help().partition("\nabsl.flags:")[0].rstrip()
            print(f"{name}: {about}\n{own}")
            if "config" in values and "--helpshort" not in wants_help:
                print(f"\n{_fields_help()}", end="")
            return 0
        with _importing():  # the config file imports much of the package
            command_line.parse(values, argv, POSITIONAL.get(name), name not in NEEDS_NO_CONFIG)
        patience = preemption.PATIENCE if name in STOPS else 0.0
        return _together(lambda: _prepared(values, execute), patience)
    except KeyboardInterrupt:  # before the command watches for signals
        print("stopped by Ctrl-C before anything was begun", file=sys.stderr)
        return 130
    except UserError as e:
        _tell(e)
        return 2
    except BrokenPipeError:
        return 1
    except OSError as e:
        _tell(_of_the_system(e))
        return 2


def _check_machine() -> None:
    """Refuses Windows, and keeps JAX's 64-bit types off, which would change draws and scores.

    Raises:
      UserError: on Windows.
    """
    if sys.platform in ("win32", "cygwin"):
        raise UserError("Windows is not supported, since programs of the code reward cannot be limited there; use WSL")
    asked = os.environ.pop("JAX_ENABLE_X64", "")
    if asked.lower() not in ("", "0", "n", "no", "f", "false", "off"):
        print(f"mdrl: note: JAX_ENABLE_X64={asked} is ignored; model.dtype sets the precision", file=sys.stderr)


def _tell(error: UserError | str) -> None:
    from mdrl_jax.progress import printable

    print(printable(f"mdrl: error: {' '.join(str(error).split())}"), file=sys.stderr)


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, in one line: an unwritable, missing or busy file, a full disk."""
    places = [os.fspath(name) for name in (error.filename, error.filename2) if name is not None]
    reason = error.strerror or str(error) or type(error).__name__
    return f"{' -> '.join(map(str, places))}: {reason}" if places else reason


def _prepared(values: flags.FlagValues, execute: Callable[[Any], int | None]) -> int | None:
    if "compilation_cache" in values:
        from mdrl_jax.parallel import programs

        if why := programs.keep_compiled(values.compilation_cache):
            note = f"compiled programs are not kept, since {why}; --compilation_cache=FOLDER keeps them in a folder"
            print(f"mdrl: note: {note}", file=sys.stderr)
    return execute(values)


def _together(execute: Callable[[], int | None], patience: float) -> int:
    """Runs a command that other hosts may run too; an error here ends it on all hosts, which report the reason.

    Args:
      execute: the command.
      patience: seconds that it has after a signal to stop in order (`preemption.watch`).
    """
    from mdrl_jax.parallel import distributed

    status, main_thread = 0, threading.current_thread() is threading.main_thread()
    try:
        with preemption.watch(patience) if main_thread else contextlib.nullcontext():
            try:
                status = execute()
            except preemption.Stopped:  # the screen has shown the message
                return distributed.finish(preemption.status())
    except Exception as e:
        if distributed.count() == 1:
            raise
        if isinstance(e, UserError | OSError):
            _tell(e if isinstance(e, UserError) else _of_the_system(e))
        elif isinstance(e, distributed.HostLost):
            _tell(f"{e}; {distributed.AGAIN}")
        else:
            traceback.print_exc()
        return distributed.finish(2 if isinstance(e, UserError | OSError) else 1, e)
    return distributed.finish(status or 0)


def _whole(name: str) -> None:
    """Lets a standard stream that is not UTF-8 escape what it cannot write, instead of ending the command."""
    stream: Any = getattr(sys, name)
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    if encoding != "utf8" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def cli() -> None:
    """The installed command `mdrl`: runs `main` with `sys.argv` and exits with its status, by SystemExit.

    Except for `bench`, `transformers` is kept from importing torch.
    """
    from mdrl_jax.model import tokens

    for name in ("stdout", "stderr"):
        _whole(name)
    tokens.leave_torch_out = sys.argv[1:2] != ["bench"]  # the peers of `bench` need torch
    status = main()
    if status in (preemption.STATUS, 130):  # a usual exit waits for the programs that the devices are running
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    cli()

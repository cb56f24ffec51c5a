"""Costs, versions and configuration of a run, and samples of its completions."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Set
from typing import Any

import altair as alt

from mdrl_jax.report.figure import Figure, Table, by_category, data
from mdrl_jax.report.folder import Absent, Records

KINDS = {
    "grpo": "GRPO",
    "sft": "supervised",
    "rollback": "rollback",
    "merge": "merge",
    "recover": "planned recovery",
    **dict.fromkeys(("plan", "trials", "orders"), "planning"),
}


def costs(records: Records) -> Figure:
    """The time in seconds of every stage but an analysis; tooltips add its steps, tokens, FLOPs and memory.

    Returns:
      The figure `costs`, a horizontal bar for each record `costs/*.json`, coloured by the kind of stage. Time and FLOPs
      leave out the scoring after a stage and the analysis. Validation scores that a stage itself needs are included.
      `stages.train.costs` says which FLOPs are counted.

    Raises:
      Absent: if there is no such record.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    found = [records.json(path) for path in records.files("costs/*.json")]
    rows = [
        {
            "stage": c["stage"],
            "kind": KINDS.get(c["kind"], c["kind"]),
            "seconds": float(c["seconds"]),
            "steps": c["steps"],
            "tokens_sampled": c["tokens_sampled"],
            "tokens_trained": c["tokens_trained"],
            "flops": c["flops"],
            "gib": c["peak_bytes"] / 2**30 if "peak_bytes" in c else None,
        }
        for c in found
    ]
    tips = [
        alt.Tooltip("stage:N"),
        alt.Tooltip("kind:N"),
        alt.Tooltip("seconds:Q", format=".1f"),
        alt.Tooltip("steps:Q", title="optimizer steps"),
        alt.Tooltip("tokens_sampled:Q", format=",.0f", title="tokens sampled"),
        alt.Tooltip("tokens_trained:Q", format=",.0f", title="tokens trained on"),
        alt.Tooltip("flops:Q", format=".3~s", title="FLOPs of the model"),
        alt.Tooltip("gib:Q", format=".2f", title="most memory until its end, GiB"),
    ]
    chart = (
        alt.Chart(data(rows))
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q", title="time, seconds"),
            y=alt.Y("stage:N", sort=None, title=None),
            color=alt.Color("kind:N", scale=_kinds({r["kind"] for r in rows}), title=None),
            tooltip=tips,
        )
        .properties(width=400, height=alt.Step(18))
    )
    total = sum(r["seconds"] for r in rows)
    flops = sum(r["flops"] for r in rows)
    caption = (
        f"{total:.0f} s and {flops:.3g} FLOPs in all, without the scoring after each stage, the analysis, and the "
        "comparison of rollbacks with their controls. FLOPs count the model's matrices only: 2 for each weight and "
        "token that is read, sampled or passed forward, 6 where a gradient is taken, 10 where first and second "
        "derivatives are."
    )
    peaks = [r["gib"] for r in rows if r["gib"] is not None]
    caption += f" The process took at most {max(peaks):.1f} GiB of memory." if peaks else ""
    return Figure("costs", "Time of each stage", chart, rows, caption)


def analysed(records: Records) -> Table:
    """Time and memory of each unit of the analysis, from `analysis/spent.json`, and what it left out.

    Returns:
      The table `analysis-costs`, with the columns "unit", "seconds" and "most memory until its end, GiB". Rows of what
      was left out have "not run" for the seconds, and the last column says what it would take.

    Raises:
      Absent: if there is no such record.
      UserError: if a record is not valid JSON.
      KeyError: if a record lacks a field.
    """
    spent, settings = records.json("analysis/spent.json"), records.json("analysis/settings.json")["analyze"]
    rows = [(unit, f"{took['seconds']:.0f}", f"{took['peak_bytes'] / 2**30:.1f}") for unit, took in spent.items()] + [
        (what, "not run", cost) for what, cost in _left_out(settings)
    ]
    total = sum(took["seconds"] for took in spent.values())
    caption = (
        f"{total:.0f} s for the units listed. Memory is that of the fullest device, or of the process on the CPU. The "
        "command `fit` prints memory and time of the programs for a TPU slice."
    )
    head = ("unit", "seconds", "most memory until its end, GiB; or what it takes")
    return Table("analysis-costs", "Time and memory of the analysis", head, rows, caption, head[1:2], folded=True)


def _left_out(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields each measurement that the settings of an analysis leave out, with its cost in words."""
    vectors = settings["lanczos_block"] * settings["lanczos_steps"]
    if not settings["permutations"]:
        yield (
            "null of the largest eigenvalue (analyze.permutations)",
            "40 permutations take up to 40 searches as long as that of the conflict subspace",
        )
    for space, which in (("heads", "the route with its heads"), ("all", "the space of all parameters")):
        if space not in settings["removal_spaces"]:
            yield (
                f"conflict subspace in {which} (analyze.removal_spaces)",
                f"{vectors} Hessian products on each half of the prompts, and memory for {vectors} edits",
            )
    if not settings["theorem"]:
        yield (
            "assumptions of the contraction theorem (analyze.theorem)",
            f"{2 * settings['vectors']} Hessian products with each prompt, and memory for as many edits",
        )


def _kinds(shown: Set[str]) -> alt.Scale:
    """The colours of the kinds of stages that are shown; each kind has the same colour in every run."""
    colours = by_category(list(dict.fromkeys([*KINDS.values(), *sorted(shown)]))).to_dict()
    found = [(k, c) for k, c in zip(colours["domain"], colours["range"], strict=True) if k in shown]
    return alt.Scale(domain=[k for k, _ in found], range=[c for _, c in found])


def versions(records: Records) -> Table:
    """Versions of packages, devices, and the revision of the source, from `config.json`.

    Returns:
      The table `versions`, with the columns "what" and "which": a row for each package that was installed and for
      Python, one for all devices (for example "2 × cpu"), and one for the git revision.

    Raises:
      Absent: if `config.json` is missing.
      UserError: if it is not valid JSON.
      KeyError: if it lacks a field.
    """
    record = records.json("config.json")
    rows = [(name, str(value)) for name, value in record["versions"].items() if value]
    devices = [f"{len(list(group))} × {kind}" for kind, group in itertools.groupby(record["devices"], _kind)]
    rows += [("devices", ", ".join(devices)), ("git revision", record["git"] or "not from a checkout")]
    return Table("versions", "Versions and devices", ("what", "which"), rows, folded=True)


def configuration(records: Records) -> Table:
    """The whole resolved configuration from `config.json`, one row (field, value) for each field.

    Returns:
      The table `configuration`. A field in a section has its path with dots as its name, for example "train.steps". A
      list is one field; its items are joined by ", ".

    Raises:
      Absent: if `config.json` is missing.
      UserError: if it is not valid JSON.
      KeyError: if it has no "config".
    """
    rows = list(_flat(records.json("config.json")["config"]))
    return Table(
        "configuration", "Configuration", ("field", "value"), rows, "`--config.FIELD=VALUE` sets a field.", folded=True
    )


def _kind(device: str) -> str:
    return device.split(":")[0]


def _flat(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclasses.dataclass(frozen=True)
class Reading:
    """One prompt of a domain with the first completion after each stage.

    Attributes:
      domain, prompt: name of the domain, and text of the prompt.
      wanted: what its reward asks for, in words; "" in records of earlier versions.
      replies: (stages, text of the completion, reward in [0, 1]), in the order of the first of the stages. Stages whose
        completions and rewards are the same share one reply.
    """

    domain: str
    prompt: str
    wanted: str
    replies: tuple[tuple[tuple[str, ...], str, float], ...]


def samples(records: Records, prompts: int = 3) -> list[Reading]:
    """Completions to compare between stages: the first prompts of each domain that have a completion of every stage.

    Args:
      records: the work folder, whose `samples/NN-STAGE.jsonl` are read. A file without lines does not count as a stage.
      prompts: largest number of prompts of each domain, 0 or more.

    Returns:
      The readings, domain by domain, in the order of the first file; none of a domain if no prompt of it has a
      completion of every stage. Of several completions of a prompt the first one counts.

    Raises:
      Absent: if there are no completions yet.
      UserError: if a line of a file is not valid JSON.
      KeyError: if a line lacks "domain", "prompt", "completion" or "reward".
    """
    stages: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for path in records.files("samples/*.jsonl"):
        stage = path.split("/")[-1].removesuffix(".jsonl").split("-", 1)[1]
        for row in records.jsonl(path):
            stages.setdefault(stage, {}).setdefault((row["domain"], row["prompt"]), row)
    if not stages:
        raise Absent("samples/ holds no completions yet")
    shared = [key for key in next(iter(stages.values())) if all(key in found for found in stages.values())]
    readings = []
    for domain, keys in itertools.groupby(shared, lambda key: key[0]):
        for key in itertools.islice(keys, prompts):
            same: dict[tuple[str, float], list[str]] = {}
            for stage, rows in stages.items():
                row = rows[key]
                same.setdefault((str(row["completion"]), float(row["reward"])), []).append(stage)
            replies = tuple((tuple(names), *reply) for reply, names in same.items())
            wanted = next((str(rows[key]["wanted"]) for rows in stages.values() if "wanted" in rows[key]), "")
            readings.append(Reading(str(domain), str(key[1]), wanted, replies))
    return readings

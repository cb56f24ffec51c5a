"""What happened to single answers: transitions, pass@k, and answers that were lost (definitions §2)."""

import altair as alt

from mdrl_jax import records as files
from mdrl_jax.report.figure import INK, Figure, Row, Table, data
from mdrl_jax.report.figures.layout import LEGEND, distinct, panels, side_by_side
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.intervals import columns, number, tooltips, words
from mdrl_jax.report.tables.answers import Change, headlines, lost_answers, passes, steps
from mdrl_jax.report.tables.matrix import Matrix

PAIRS, LETTERS = 10, 400  # lost answers that are shown, and the most characters of each text
WAYS = {"lost": "right → wrong", "gained": "wrong → right"}


def shares(records: Records) -> Figure:
    """The share of each domain's answers that every stage turned from right to wrong and from wrong to right.

    Returns:
      The figure `transitions`: a small chart for each domain with a line for each stage. Bars to the left are answers
      that were lost since the stage's start, bars to the right those that were gained, in points of all answers. Ticks
      show what other sampling keys change at the start.

    Raises:
      Absent: if no two stages have been scored yet, one of which started from the other.
      UserError, KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = records.matrix()
    rows = [row for c in steps(found) for row in _bars(c)]
    if not rows:
        raise Absent("transitions need a stage and its start, both scored")
    domains, stages = distinct(rows, "domain"), distinct(rows, "stage")
    y = alt.Y("stage:N", sort=stages, title=None)
    x = alt.X("share:Q", title="points of all answers", axis=alt.Axis(labelExpr="abs(datum.value)"))
    colour = alt.Color(
        "way:N",
        scale=alt.Scale(domain=list(WAYS.values()), range=["#D55E00", "#0072B2"]),
        title=None,
        legend=LEGEND,
    )
    tips = [alt.Tooltip(f"{name}:N") for name in ("domain", "stage", "start", "way")]
    tips += tooltips({"points": "points of all answers", "points_low": "95 % from", "points_high": "95 % to"})
    tips += tooltips({"null": "by other sampling keys", "net": "change of pass@1, points"})
    base = alt.Chart(data(rows)).encode(y=y, tooltip=tips)
    bars = base.mark_bar(height={"band": 0.7}).encode(x=x, color=colour)
    whiskers = base.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q", title="points of all answers"), x2="high:Q")
    ticks = base.mark_tick(thickness=2, color=INK).encode(x=alt.X("tick:Q", title="points of all answers"))
    count, width = panels(len(domains), 2, 660, gap=90)
    chart = alt.layer(bars, whiskers, ticks).properties(width=width, height=alt.Step(20))
    whole = side_by_side(chart, "domain", domains, count)
    caption = (
        "Answers of held-out prompts since the stage's start, in points of all answers: to the left those that were "
        "right and became wrong, to the right the reverse. Whiskers are 95 % intervals over prompts. Ticks: what two "
        "draws with different sampling keys change at the start alone; a bar that does not reach further shows no more "
        f"than the luck of sampling. {_thresholds(found)}"
    )
    return Figure("transitions", "Answers lost and gained by each stage", whole, rows, caption)


def headline(records: Records) -> Table:
    """The transitions that a run is about: from each domain's peak to the last training stage, and by each recovery.

    Returns:
      The table `transitions-headline`. Shares and differences are in points of all answers with 95 % intervals.

    Raises:
      Absent: if there is no such pair of stages yet.
      UserError, KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = [(c, c.record()) for c in headlines(records.matrix())]
    if not found:
        raise Absent("no domain has been followed by another training stage yet")
    head = ("domain", "from", "to", *WAYS.values(), "other keys", "lost beyond other keys", "net")
    names = ("lost", "gained", "resampled", "lost_beyond", "net")
    rows = [(c.domain, c.before, c.after, *(words(record[n], ".1f") for n in names)) for c, record in found]
    return Table(
        "transitions-headline",
        "Answers lost and gained since the peak",
        head,
        rows,
        "In points of all answers, with 95 % intervals over prompts. Other keys: what two draws with different "
        "sampling keys change at the first of the two stages. Net: gained minus lost, the change of pass@1.",
        head[3:],
    )


def pass_at(records: Records) -> Table:
    """pass@k of every domain after every stage, beside the mean reward.

    Returns:
      The table `pass-at-k`: a row for each stage and domain, in points with 95 % intervals.

    Raises:
      Absent: if no stage has been scored yet.
      UserError, KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = records.matrix()
    per = [
        (stage, domain, passes(found, s, domain))
        for s, stage in enumerate(found.stages)
        for domain in found.domains
        if domain in found.rewards[s]
    ]
    if not per:
        raise Absent("no stage has been scored yet")
    ks = sorted({k for _, _, by_k in per for k in by_k})
    rows = []
    for stage, domain, by_k in per:
        mean = found.score_SD[found.stages.index(stage), found.domains.index(domain)]
        rows.append(
            (
                stage,
                domain,
                number(float(mean), ".1f"),
                *(words(by_k[k].record(), ".1f") if k in by_k else "–" for k in ks),
            )
        )
    head = ("after stage", "domain", "mean reward", *(f"pass@{k}" for k in ks))
    return Table(
        "pass-at-k",
        "pass@k of every domain after every stage",
        head,
        rows,
        "Points with 95 % intervals over prompts. pass@k: the probability that one of k answers to a prompt is right "
        f"(unbiased, arXiv 2107.03374). {_thresholds(found)}",
        head[2:],
    )


def lost(records: Records) -> Table:
    """Answers that were right at a domain's peak and wrong after the last training stage.

    Returns:
      The table `lost-answers`: ten answers drawn at random, of the domain that lost most of them; each with the prompt
      and both completions. Long texts are cut.

    Raises:
      Absent: if no domain has lost an answer, or the completions of a stage were not kept.
      UserError: if the file of a stage's completions is damaged; or as in `tables.matrix.build`.
      KeyError, ValueError: as in `tables.matrix.build`.
    """
    found = records.matrix()
    changes = [c for c in headlines(found) if not c.after.startswith(("refresh-", "rollback-"))]
    worst = max(changes, key=lambda c: c.found.lost.value, default=None)
    if worst is None or worst.found.lost.value == 0:
        raise Absent("no answer was lost since the peak of its domain")
    before, after = (found.stages.index(name) for name in (worst.before, worst.after))
    drawn, total = lost_answers(found, worst.domain, before, after, PAIRS)
    texts = [_texts(records, name, worst.domain) for name in (worst.before, worst.after)]
    rows = []
    for prompt, sample in drawn:
        first, second = (by_prompt[prompt] for by_prompt in texts)
        rewards = (found.rewards[s][worst.domain][prompt, sample] for s in (before, after))
        cells = (_cut(row["completions"][sample]) for row in (first, second))
        shown = (f"{text} ({number(float(reward), '.2g')})" for text, reward in zip(cells, rewards, strict=True))
        rows.append((_cut(first["text"]), *shown))
    luck = worst.found.resampled
    caption = (
        f"{len(drawn)} of {total} answers that were right after {worst.before} and wrong after {worst.after}, drawn at "
        f"random, each with its reward. ⏎ is a line break; texts are cut after {LETTERS} characters."
    )
    if luck is not None:
        expected = luck.value / 100 * found.rewards[before][worst.domain].size
        caption += f" Other sampling keys at {worst.before} alone would turn about {expected:.0f} answers wrong."
    title = f"Lost answers of {worst.domain}: after {worst.before} and after {worst.after}"
    return Table("lost-answers", title, ("prompt", f"after {worst.before}", f"after {worst.after}"), rows, caption)


def _bars(change: Change) -> list[Row]:
    record = change.record()
    head = {"domain": change.domain, "stage": change.after, "start": change.before, "net": record["net"]["estimate"]}
    rows = []
    for name, sign in (("lost", -1), ("gained", 1)):
        ends = columns("points", record[name])
        null = record[name]["null"]
        low, high = (None if ends[f"points_{end}"] is None else sign * ends[f"points_{end}"] for end in ("low", "high"))
        bar = {"share": sign * ends["points"], "low": low, "high": high, "null": null}
        rows.append(head | {"way": WAYS[name]} | ends | bar | {"tick": None if null is None else sign * null})
    return rows


def _thresholds(found: Matrix) -> str:
    by_domain = ", ".join(f"{number(found.right.get(d, 1.0), 'g')} in {d}" for d in found.domains)
    return f"An answer is right from a reward of {by_domain}."


def _texts(records: Records, stage: str, domain: str) -> list[Row]:
    """The rows of a domain in `completions/NN-stage.jsonl.gz`, in the order of the prompts."""
    paths = [p for p in records.files("completions/*.jsonl.gz") if _stage(p) == stage]
    if not paths:
        raise Absent(f"the completions after {stage} were not kept (`evaluate.keep_texts`)")
    return [row for row in files.read_zipped(records.root / paths[0]) if row["domain"] == domain]


def _stage(path: str) -> str:
    return path.split("/")[-1].removesuffix(".jsonl.gz").split("-", 1)[1]


def _cut(text: str) -> str:
    shown = " ⏎ ".join(str(text).strip().splitlines())
    return shown if len(shown) <= LETTERS else f"{shown[:LETTERS]} …"

"""A run that analyses, refreshes, rolls back, prevents, plans and tries its plan: records, costs, kills."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mdrl_jax.commands.loaded import load_stage
from mdrl_jax.model.flops import matrix_weights
from mdrl_jax.model.huggingface import read_config
from mdrl_jax.report import page
from mdrl_jax.runtime import model_folder
from tests.report import browser
from tests.test_experiment import ROOT, SMALL, command, environment, evaluations

RECOVERY = SMALL.replace(
    "def get_config():",
    """def get_config():
    c = sequence()
    c.stages = ("math", "qa", "analyze", "refresh-math", "rollback-math-qa", "agem-qa", "plan", "recover", "trials",
        "distill-all", "alternate-math-qa")
    c.stage_overrides = {"refresh-math": {"steps": 2}}
    c.stage_overrides["alternate-math-qa"] = {"steps": 2}
    c.stage_overrides["distill-all"] = {"steps": 1, "distill": {"form": "top_k", "top_k": 4}}
    c.scored_domains = ("math", "qa")
    c.domains.n_validation = 8
    c.rollout.completion_buckets = (16,)
    c.analyze.prompts, c.analyze.group_size, c.analyze.batch, c.analyze.path_prompts = 8, 4, 2, 4
    c.analyze.permutations, c.analyze.vectors, c.analyze.lanczos_steps = 0, 4, 6
    c.recover.random_sets, c.recover.control_draws, c.recover.fractions, c.recover.strengths = 2, 1, (0.03,), (1.0,)
    c.recover.rules = ("removing", "magnitude")
    c.recover.forecast_prompts = 8
    c.recover.limit, c.recover.streams = 100.0, 2
    return c

def sequence():""",
)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory) -> tuple[Path, Path, str]:
    """The same of a run that analyses, refreshes, rolls back and prevents."""
    folder = tmp_path_factory.mktemp("recovery")
    config = folder / "recovery.py"
    config.write_text(RECOVERY)
    done = subprocess.run(
        command(config, folder / "whole"), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return config, folder / "whole", done.stdout


def read(workdir: Path, name: str):
    return json.loads((workdir / f"{name}.json").read_text())


def test_what_wins_a_domain_back_is_scored_and_judged(recovered):
    _, workdir, shown = recovered
    names = ["00-base", "01-math", "02-qa", "04-refresh-math", "05-rollback-math-qa", "06-agem-qa", "08-recover"]
    names += ["10-distill-all", "11-alternate-math-qa"]
    assert [f.stem for f in sorted((workdir / "evaluations").glob("*.json"))] == names
    assert [c["id"] for c in read(workdir, "claims")] == [f"C{i}" for i in range(1, 8)]
    assert all(f"C{i} " in shown for i in range(1, 8))
    refresh = read(workdir, "recovery/refresh-math")
    looked = [row["step"] for row in refresh["steps"]]
    assert looked in ([0, 1], [0, 1, 2]) and refresh["chosen"] in looked
    assert (refresh["stopped"] == "the budget ended") <= (looked[-1] == 2) and refresh["stopped"]
    # Repeats are measured at their ends, if the analysis found a subspace to measure in.
    repeats = ["refresh-math-2", "refresh-math-by-qa"] if refresh["contraction"] else []
    assert [s["stream"] for s in refresh.get("streams", ())] == repeats
    assert all(s["distance"] > 0 and s["step"] == looked[-1] for s in refresh.get("streams", ()))
    assert {c["streams"] for c in refresh["contraction"]} <= {2}
    c6, c7 = read(workdir, "claims")[5:]
    assert c6["rows"][0]["path"] == refresh["steps"][-1]["path"] > 0 and c6["rows"][0]["variant"] == ""
    assert "plain sequence" in c6["rows"][0]["rivals"] and c6["old_rule"] and c7["old_rule"]


def test_the_step_that_a_refresh_keeps_is_the_one_saved(recovered):
    _, workdir, _ = recovered
    kept, start = (load_stage(str(workdir), name).params for name in ("refresh-math", "qa"))
    same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), kept, start)))
    assert same == (read(workdir, "recovery/refresh-math")["chosen"] == 0)


def test_a_distillation_asks_each_domains_teacher_once_and_ends_by_the_rule_of_a_refresh(recovered):
    _, workdir, shown = recovered
    record, cost = read(workdir, "recovery/distill-all"), read(workdir, "costs/10-distill-all")
    assert [row["step"] for row in record["steps"]] == [0, 1] and set(record["peaks"]) == {"math", "qa"}
    assert record["peak"] == record["peaks"][record["domain"]] and record["steps"][1]["path"] > 0
    # The student's likeliest tokens take one pass, and the teachers one between them: their rows are in micro-batches
    # of their own.
    assert cost["steps"] == 1 and cost["tokens_forward"] == 2 * cost["tokens_trained"] > 0
    assert "nats a token on the student's top k, and about" in " ".join(shown.split())
    assert (workdir / "report/distill-all.png").exists()


def test_an_alternating_refresh_says_how_far_its_ends_are_from_pareto_stationary(recovered):
    _, workdir, shown = recovered
    record = read(workdir, "recovery/alternate-math-qa")
    assert set(record["peaks"]) == {"math", "qa"} and set(record["pareto"]) == {"before", "after"}
    for found in record["pareto"].values():
        assert found["domains"] == ["math", "qa"] and found["norm"]["n"] == 8
        low, high = found["norm"]["ci95"]
        assert 0 <= low <= found["norm"]["estimate"] <= min(high, max(found["norms"]) + 1e-9)
    assert (record["pareto"]["before"] == record["pareto"]["after"]) == (record["chosen"] == 0)
    assert "alternate-math-qa: smallest norm of a convex combination" in " ".join(shown.split())


def test_a_rollback_takes_the_recorded_part_of_the_edit_back(recovered):
    _, workdir, _ = recovered
    record = read(workdir, "recovery/rollback-math-qa")
    before, now, after = (load_stage(str(workdir), n).params for n in ("math", "qa", "rollback-math-qa"))
    chosen = record["chosen"] or {"size": 0, "strength": 0.0}
    changed = 0
    for was, is_now, got in zip(*map(jax.tree.leaves, (before, now, after)), strict=True):
        moved = np.asarray(is_now != got)
        expected = np.asarray(is_now) - np.float32(chosen["strength"]) * np.asarray(is_now - was)
        np.testing.assert_allclose(np.asarray(got)[moved], expected[moved], rtol=1e-6, atol=1e-8)
        changed += int(moved.sum())
    assert changed <= chosen["size"] and changed >= 0.99 * chosen["size"]


def test_costs_are_those_of_the_tokens(recovered):
    _, workdir, _ = recovered
    qa, agem, refresh, rollback = (
        read(workdir, f"costs/{name}") for name in ("02-qa", "06-agem-qa", "04-refresh-math", "05-rollback-math-qa")
    )
    assert (qa["steps"], agem["steps"], rollback["steps"]) == (3, 3, 0)
    # The cost of a rollback is that of making it. The comparison with controls is recorded apart.
    assert rollback["tokens_sampled"] == read(workdir, "recovery/rollback-math-qa")["costs"]["tokens_sampled"] > 0
    assert refresh["steps"] == read(workdir, "recovery/refresh-math")["steps"][-1]["step"]
    assert 0 < qa["tokens_sampled"] <= 3 * 4 * 4 * 16
    # In training a prompt is read with each of its completions, while sampling once. Rows of groups whose rewards do
    # not differ are sampled and not trained.
    for cost in (qa, agem):
        assert 0 < cost["tokens_trained"] <= 4 * cost["tokens_read"] + cost["tokens_sampled"]
    assert agem["tokens_sampled"] > qa["tokens_sampled"]  # those kept of Math
    # A-GEM: at each of 3 steps a gradient on a micro-batch of 2 prompts with 4 completions of at most 16 tokens each.
    assert qa["tokens_gradient"] == qa["tokens_jets"] == 0
    # The KL is measured at 2 of the 3 steps, each time with two passes.
    assert 0 < qa["tokens_forward"] < 2 * (4 * qa["tokens_read"] + qa["tokens_sampled"])
    assert 3 * 8 < agem["tokens_gradient"] <= 3 * 8 * (16 + 16)
    # It keeps one domain: 7 operations for each parameter and step.
    n = sum(x.size for x in jax.tree.leaves(load_stage(str(workdir), "qa").params))
    assert agem["operations"] == 3 * 7 * n and qa["operations"] == 0
    # The rule `removing` has jets, a gradient and a Fisher diagonal of the same 8 prompts; the route has activities.
    passes = rollback["tokens_gradient"] / rollback["tokens_jets"]
    assert rollback["tokens_trained"] == 0 and passes >= 2 and passes == int(passes)
    assert 0 < rollback["tokens_forward"] <= 2 * 8 * 4 * (16 + 16)
    # The sweep samples 2 completions of 8 prompts for each of its points, for both domains and before.
    swept = len(read(workdir, "recovery/rollback-math-qa")["points"])
    assert rollback["tokens_sampled"] >= (1 + swept) * 2 * 8 * 2
    plan, trials, recover = (read(workdir, f"costs/{name}") for name in ("07-plan", "09-trials", "08-recover"))
    assert (plan["kind"], trials["kind"], plan["steps"]) == ("plan", "trials", 0)
    assert plan["tokens_gradient"] > 0 and plan["tokens_sampled"] > 0 and plan["tokens_forward"] > 0
    tried = read(workdir, "recovery/trials")
    assert trials["tokens_sampled"] >= len(tried) * 2 * 8 * 2 and trials["tokens_trained"] > 0
    config = read_config(model_folder(read(workdir, "config")["config"]["model"]["path"]))
    for cost in (qa, agem, refresh, rollback, plan, trials, recover):
        passes = sum(cost[f"tokens_{k}"] for k in ("read", "sampled", "forward"))
        passes += 3 * (cost["tokens_gradient"] + cost["tokens_trained"]) + 5 * cost["tokens_jets"]
        assert cost["flops"] == 2 * matrix_weights(config) * passes + cost["operations"] and cost["seconds"] > 0
        assert passes > 0 or cost is recover  # whose action may be to do nothing


def test_every_stage_says_where_it_started(recovered):
    _, workdir, _ = recovered
    files = sorted((workdir / "evaluations").glob("*.json"))
    starts = {r["stage"]: r["start"] for r in (json.loads(file.read_text()) for file in files)}
    assert starts == {
        **{"base": None, "math": "base", "qa": "math", "refresh-math": "qa", "rollback-math-qa": "qa"},
        **{"agem-qa": "math", "recover": "qa", "distill-all": "qa", "alternate-math-qa": "qa"},
    }


def test_a_plan_is_tried_and_acted_on(recovered):
    _, workdir, shown = recovered
    plan, tried = read(workdir, "recovery/plan"), read(workdir, "recovery/trials")
    names = [row["name"] for row in plan["actions"]]
    assert names[0] == plan["pick"] and plan["reason"][:40] in " ".join(shown.split())
    assert {n.partition("-")[0] for n in names} <= {"nothing", "refresh", "rollback"} and "refresh-math-1" in names
    assert set(tried) == set(names) - set(plan["left_out"])
    compared = read(workdir, "recovery/outcomes")
    assert [row["name"] for row in compared["actions"]] == [n for n in names if n in tried]
    before = np.asarray(tried["nothing"]["math"]).mean()
    row = next(r for r in compared["actions"] if r["name"] == "refresh-math-1")
    change = 100 * (np.asarray(tried["refresh-math-1"]["math"]).mean() - before)
    assert row["changes"]["math"]["measured"]["estimate"] == pytest.approx(change)
    recover, start = (load_stage(str(workdir), name).params for name in ("recover", "qa"))
    same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), recover, start)))
    assert same == (plan["pick"] == "nothing")


@pytest.mark.slow  # `python tests/kills.py` kills recovery too
def test_recovery_that_is_killed_goes_on_to_the_same_end(recovered, tmp_path):
    config, uninterrupted, _ = recovered
    workdir = tmp_path / "killed"
    shutil.copytree(uninterrupted, workdir)
    for name in (
        "evaluations/04*",
        "evaluations/05*",
        "evaluations/06*",
        "evaluations/08*",
        "recovery/*",
        "checkpoints/0[4568]*",
    ):
        for found in workdir.glob(name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    process = subprocess.Popen(
        command(config, workdir), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 400
    while not (workdir / "recovery" / "rollback-math-qa.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command(config, workdir), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert evaluations(workdir) == evaluations(uninterrupted)
    for name in ("claims", "recovery/outcomes"):
        assert read(workdir, name) == read(uninterrupted, name)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(
    ("dark", "widths"),
    [(False, (800,)), (True, (400, 1400)), pytest.param(False, (400, 1400), marks=pytest.mark.slow)],
)
def test_the_page_is_whole_in_a_browser(recovered, tmp_path, dark, widths):
    """Texts and marks have their contrast, nothing overflows, and every chart has its files, at each width."""
    _, workdir, shown = recovered
    written = workdir / "report/index.html"
    assert str(written) in shown.replace("\n", "")
    for width, met in browser.look(written, tmp_path, dark, widths).items():
        assert met["errors"] == met["blocked"] == met["resources"] == browser.faults(met, width) == [], width
        assert met["folded"] < 0.9 * met["tall"], width
        names = {c["name"] for c in met["charts"]}
        for kind in ("png", "svg", "pdf"):
            assert names == {p.stem for p in (workdir / "report").glob(f"*.{kind}")}
        assert {p.stem for p in (workdir / "report").glob("*.csv")} > names
        assert {"scores", "paths", "refresh-math", "rollback-math-qa", "plan", "damage-reward", "edit-sizes"} <= names
        assert {"training-reward", "training-entropy", "training-length"} <= names
        for chart in met["charts"]:
            assert chart["marks"] > 0 and min(chart["width"], chart["height"]) > 60, chart
            assert width < 1400 or chart["right"] <= width, chart


def test_the_page_of_a_run_that_was_killed_and_damaged_shows_the_rest(recovered, tmp_path):
    _, workdir, _ = recovered
    part = tmp_path / "part"
    shutil.copytree(workdir, part, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "report"))
    for name in ("05-rollback-math-qa", "06-agem-qa", "08-recover"):
        (part / f"evaluations/{name}.json").unlink()
    for name in ("rollback-math-qa", "plan", "outcomes"):
        (part / f"recovery/{name}.json").unlink()
    damage = part / "analysis/damage.json"
    damage.write_text(damage.read_text()[:5000])
    edits = read(part, "analysis/edits")
    del edits["domains"]
    (part / "analysis/edits.json").write_text(json.dumps(edits))
    html = page.write(part).read_text()
    pictures = {p.stem for p in (part / "report").glob("*.png")}
    assert {"scores", "refresh-math", "gradient-modules"} <= pictures
    assert not pictures & {"rollback-math-qa", "plan", "damage-reward", "edit-sizes"}
    assert "not yet: rollback-math-qa, agem-qa, recover" in html
    assert "recovery/plan.json is not there: the stage <code>plan</code> writes it" in html
    assert "damage.json is not valid JSON" in html.replace("&#39;", "'") and html.count('class="note"') >= 2

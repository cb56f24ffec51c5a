"""The whole analysis on small sequences: laws of its figures, resume, refusals, and the same from any folder."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mdrl_jax import records, runtime
from mdrl_jax.analysis import interference, routes, samples
from mdrl_jax.analysis.checkpoint_figures import shared_route, solo_effects
from mdrl_jax.analysis.probe import build
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Trained
from mdrl_jax.analysis.subspace import conflict, removal, theorem
from mdrl_jax.checkpoints import StageCheckpoints
from mdrl_jax.config import EMBEDDED_MODEL, Config, default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.main import main
from mdrl_jax.model import huggingface
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.parallel.sharding import make_mesh
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.rl.trainer import TrainState
from mdrl_jax.second_order.lanczos import random_block
from mdrl_jax.second_order.objectives import success_nll
from mdrl_jax.stage import resolve_stages
from mdrl_jax.workfolder import WorkFolder
from tests.conftest import compiling_fast


@pytest.fixture(scope="module", autouse=True)
def one_quick_device() -> Iterator[None]:
    """Runs on one of the eight devices, and compiles every program of the module alike, to slower code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


SMALL = """
from mdrl_jax import config

def get_config():
    c = config.default()
    c.stages = ("code", "math", "analyze")
    c.scored_domains = ("code", "math")
    c.mesh.data = 1
    c.rewards.workers = 1
    c.evaluate.batch = 4
    c.domains.n_test = 4
    c.rollout.prompt_buckets = (BUCKET,)
    c.rollout.completion_buckets = (8,)
    c.analyze.prompts = 8
    c.analyze.group_size = 4
    c.analyze.batch = 2
    c.analyze.path_prompts = 4
    c.analyze.vectors = 4
    c.analyze.lanczos_block = 2
    c.analyze.lanczos_steps = 6
    c.analyze.permutations = 0
    return c
"""
SOLOS = (Trained("solo-math", "math", BASE), Trained("solo-cw", "cw", BASE), Trained("again", "math", BASE))
STAGES = (Trained("math", "math", BASE), Trained("qa", "qa", "math"), Trained("cw", "cw", "qa"))


def small(**changes: Any) -> Config:
    """The configuration of SMALL for the embedded model, with fields of `analyze` changed."""
    c = default()
    c.scored_domains = ("math", "qa", "cw")
    c.stages = ("math", "qa", "cw")
    c.mesh.data = 1
    c.rewards.workers = 1
    c.rollout.prompt_buckets = (12,)
    c.rollout.completion_buckets = (16,)
    c.evaluate.batch = 4
    c.domains.n_test = 4
    c.analyze.update(
        {"prompts": 16, "group_size": 4, "batch": 4, "path_prompts": 4, "vectors": 4, "lanczos_block": 2}
        | {"lanczos_steps": 6, "permutations": 0, "conflicts": 1}
        | changes
    )
    return parse(c)


@pytest.fixture(scope="module")
def built() -> Iterator[runtime.Runtime]:
    """What an analysis runs with."""
    config = small()
    with runtime.make_pool(config.rewards) as pool:
        yield runtime.build(config, pool)


def edited(params: Any, seed: int, size: float) -> Any:
    """Parameters after an edit of relative size `size`, dense and random."""
    rng = np.random.default_rng(seed)

    def move(x: jax.Array) -> jax.Array:
        x = np.asarray(x)
        return jax.numpy.asarray(x + size * x.std() * rng.normal(size=x.shape).astype(np.float32))

    return jax.tree.map(move, params)


def analysed(built: runtime.Runtime, folder: Path, params: Callable[[str], Any]) -> dict[str, Any]:
    """The findings of `STAGES` with these parameters."""
    checkpoints = Checkpoints(STAGES, SOLOS, params)
    with Screen(folder / "log.txt") as screen, jax.set_mesh(built.mesh), compiling_fast():
        return interference.run(built, checkpoints, folder, built.config.train.grpo, screen.steps)


@pytest.fixture(scope="module")
def sequence(built, tmp_path_factory) -> tuple[Path, dict[str, Any], Callable[[str], Any]]:
    """math: a small edit; qa: no edit at all; cw: another small one. Folder, findings and parameters.

    The two solo stages of math have the same small edit.
    """
    base = built.base_params()
    made = {BASE: base, "math": edited(base, 1, 0.02)}
    made["qa"] = made["math"]
    made["cw"] = edited(made["qa"], 2, 0.02)
    made |= {"solo-math": edited(base, 3, 0.02), "solo-cw": edited(base, 4, 0.01)}
    made["again"] = made["solo-math"]
    folder = tmp_path_factory.mktemp("analysis")
    return folder, analysed(built, folder, made.__getitem__), made.__getitem__


def pair(found: dict[str, Any], domain: str, stage: str) -> dict[str, Any]:
    """The objectives of one pair of the damage table."""
    return next(p for p in found["damage"]["pairs"] if (p["domain"], p["stage"]) == (domain, stage))["objectives"]


def test_a_stage_that_changes_nothing_does_no_damage(sequence):
    _, found, _ = sequence
    for name, figures in pair(found, "math", "qa").items():
        for term in ("first", "second", "predicted", "measured", "remainder"):
            if term in figures and figures[term]["estimate"] is not None:
                # Measured log-probs of both ends come from two programs, which round differently.
                assert abs(figures[term]["estimate"]) < 1e-6, (name, term)
    edits = found["edits"]["domains"]
    assert edits["qa"]["all"]["fp32"]["unchanged"]["estimate"] == 1.0
    assert edits["cw"]["all"]["fp32"]["unchanged"]["estimate"] < 0.01


def test_the_expansion_tells_the_nll_of_a_small_edit_along_the_whole_path(sequence):
    _, found, _ = sequence
    nll = pair(found, "math", "cw")["success_nll"]
    size = abs(nll["first"]["estimate"]) + abs(nll["second"]["estimate"])
    assert size > 1e-3
    for step in nll["curve"]:
        # What is left is third order.
        assert abs(step["remainder"]["estimate"]) < 0.15 * step["alpha"] ** 2 * size, step["alpha"]
    left = [abs(row["remainder"]["estimate"]) for row in nll["segments"]]
    assert left[-1] < 0.1 * left[0] + 2e-6  # differences of log-probs in float32


def test_two_solo_stages_that_end_alike_have_the_same_neurons(sequence):
    _, found, _ = sequence
    (again,) = found["edits"]["again"]
    assert (again["domain"], again["stages"]) == ("math", ["solo-math", "again"])
    assert again["by_layer"]["estimate"] == again["global"]["estimate"] == 1.0
    assert (
        "lap" in found["claims"][1]["reason"] and found["claims"][1]["parts"][0]["part"] == "below half of the ceiling"
    )


def test_an_edit_on_the_shared_route_changes_the_nll_of_each_prompt_as_its_gradient_predicts(built):
    probe, base = build(built, built.config.train.grpo), built.base_params()
    with jax.set_mesh(built.mesh):
        drawn = {d: samples.draw(built, base, d) for d in ("math", "cw")}
        activity = {d: probe.activity(base, sample) for d, sample in drawn.items()}
        route_LF = shared_route(activity["math"], activity["cw"])
        assert 0 < route_LF.sum() < 0.1 * route_LF.size
        moved = edited(base, 5, 0.01)
        on_route = {"gate": route_LF[:, None, :], "up": route_LF[:, None, :], "down": route_LF[:, :, None]}
        layers = dict(base["layers"])
        for name, where in on_route.items():
            layers[name] = {"kernel": jax.numpy.where(where, moved["layers"][name]["kernel"], layers[name]["kernel"])}
        solos = {"math": base | {"layers": layers}, "cw": base}
        pairs = solo_effects(probe, base, activity, drawn, solos.__getitem__, lambda text: None)
    assert [(p["domain"], p["edit"]) for p in pairs] == [("cw", "math"), ("math", "cw")]
    assert pairs[0]["neurons"] == route_LF.sum()
    predicted, measured = (np.array(pairs[0][k]) for k in ("predicted", "measured"))
    assert predicted.size == drawn["cw"].success_PG.any(axis=1).sum() > 3
    assert np.abs(measured).max() > 1e-3
    np.testing.assert_allclose(predicted, measured, atol=0.1 * np.abs(measured).max())
    assert not np.any(pairs[1]["predicted"]) and np.allclose(pairs[1]["measured"], 0.0, atol=1e-4)


def test_the_gradients_of_successes_are_those_of_their_nll(built):
    """Against `objectives.success_nll`; a gradient of blocks counts a block by its successes."""
    probe, base = build(built, built.config.train.grpo), built.base_params()
    with jax.set_mesh(built.mesh):
        sample = samples.draw(built, base, "cw")
        rows = probe.rows(sample, adv_PG=sample.success_PG)
        of_rows = jax.jit(jax.grad(lambda p, x: jax.numpy.divide(*success_nll(probe.fused)(p, x, ()))))
        for micro in rows[:2]:
            share = float(micro.success_B.mean())
            want = jax.tree.map(lambda x, share=share: share * x, of_rows(base, micro))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), probe.gradient(base, micro), want)


def test_the_theorem_is_measured_for_what_was_found_if_the_configuration_asks_for_it(
    built, sequence, tmp_path, monkeypatch
):
    folder, _, params = sequence
    shutil.copytree(folder / "analysis", tmp_path / "analysis")
    halves = [{"measured_dimension": None, "eigenvalues": [2.0 + i]} for i in (0, 1)]
    vectors, given = [{"gate": np.zeros((1 + i, 2))} for i in (0, 1)], []
    monkeypatch.setattr(conflict, "find", lambda *a: ({"halves": halves}, vectors))
    monkeypatch.setattr(removal, "on_route", lambda *a: {})
    monkeypatch.setattr(interference, "save_tree", lambda *a: None)
    monkeypatch.setattr(theorem, "measure", lambda *a: given.append(a) or {"halves": []})
    for asked in (False, True):
        analyze = dataclasses.replace(built.config.analyze, theorem=asked)
        runtime = dataclasses.replace(built, config=dataclasses.replace(built.config, analyze=analyze))
        made = build(built, built.config.train.grpo)
        with jax.set_mesh(built.mesh):
            one = interference.Analysis(runtime, Checkpoints(STAGES, SOLOS, params), tmp_path, made, {})
            record = one.conflict("math", STAGES[2], "success_nll", lambda text: None)
        assert ("theorem" in record) == asked
    ((_, at, objective, sample, found, _),) = given
    assert found == [(vectors[0], [2.0]), (vectors[1], [3.0])]
    assert objective == "success_nll" and sample.n_prompts == 16 and at.route.size > 0


@pytest.mark.slow  # compiles the analysis for a further space; test_removal.py compares the masks with dense algebra
def test_curvature_of_all_parameters_cut_to_the_neurons_of_a_route_is_that_of_the_route(built, monkeypatch):
    """And S found there undoes what S found on the route does."""
    monkeypatch.setattr(removal, "N_RANDOM", 1)
    probe, base = build(built, built.config.train.grpo), built.base_params()
    model = built.model.config
    with jax.set_mesh(built.mesh):
        sample = samples.draw(built, base, "math").take(np.arange(8))
        activity = probe.activity(base, sample)
        neurons_LF, heads_LH = shared_route(activity, activity), shared_route(activity, activity, "heads")
        displacement = probe.difference(edited(base, 5, 0.1), base)
        at = conflict.place(probe, base, displacement, conflict.route(neurons_LF))
        packed = [conflict.pack(probe, "success_nll", sample, part) for part in conflict.halves_of(sample)]
        block = random_block(jax.random.key(0), at.point, 2)
        lift = jax.vmap(lambda z: probe.lift(z, at.route.index_LR, at.route.mask_LR, base))
        support = routes.support(base, neurons_LF, np.zeros_like(heads_LH))
        rows = probe.rows(packed[0].sample, packed[0].batch)
        whole = probe.hessian(base, (), rows, packed[0].n, support)(lift(block))
        want = lift(packed[0].hessian(probe, at)(block))
        size = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * size), whole, want)

        spectra = [conflict.spectrum_of(probe, at, p, i, "half", lambda text: None) for i, p in enumerate(packed)]
        found = [(s.vectors, s.values.size) for s in spectra]
        on_route = removal.on_route(probe, at, sample, found, lambda text: None)
        narrow = removal.elsewhere(probe, "neurons", base, displacement, support, sample, lambda text: None)
    assert min(on_route["k"]) > 0 and on_route["damage"]["ci95"][0] > 0
    assert on_route["n_prompts"] == sample.success_PG.any(axis=1).sum()
    for name in ("damage", "route", "undone", "added"):
        # Damage is −log π in float32. The leading eigenvalues may have converged to a different degree.
        assert narrow[name]["estimate"] == pytest.approx(on_route[name]["estimate"], rel=0.1, abs=1e-3), name
    assert narrow["share_of_norm"] == pytest.approx(on_route["share_of_norm"], rel=0.1)
    both = routes.support(base, neurons_LF, heads_LH)["layers"]
    assert (both["q"]["kernel"].sum(), both["o"]["kernel"].sum()) == (heads_LH.sum(), heads_LH.sum())
    assert 0 < both["k"]["kernel"].sum() <= heads_LH.sum() and both["k"]["kernel"].shape[2] == model.n_kv_heads
    assert not any(x.any() for x in jax.tree.leaves(routes.support(base, neurons_LF, heads_LH)["embedding"]))


def test_figures_have_interval_null_and_count(sequence):
    _, found, _ = sequence

    def visit(value: Any, path: str) -> int:
        if isinstance(value, list):
            return sum(visit(x, path) for x in value)
        if not isinstance(value, dict):
            return 0
        if "estimate" in value and "n" in value:
            assert {"ci95", "null"} <= value.keys(), path
            assert value["estimate"] is not None or value["reason"], path
        return ("estimate" in value) + sum(visit(v, f"{path}/{k}") for k, v in value.items())

    assert visit({k: v for k, v in found.items() if k != "claims"}, "") > 500
    assert [c["id"] for c in found["claims"]] == ["C1", "C2", "C3", "C4", "C5"]
    for claim in found["claims"]:
        assert claim["verdict"] in ("supported", "contradicted", "undecided") and claim["reason"]


def test_the_files_are_json_without_nan(sequence):
    folder, found, _ = sequence
    for name in ("edits", "gradients", "peak_gradients", "solo_effects", "routes", "damage", "subspace"):
        text = (folder / "analysis" / f"{name}.json").read_text()
        assert json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is no JSON")) == found[name]
    assert records.read_json(folder / "claims.json") == found["claims"]


def test_an_analysis_started_again_makes_nothing_twice(sequence, built):
    folder, found, params = sequence
    before, spent = sum(compilations.values()), folder / "analysis" / "spent.json"
    took = records.read_json(spent)
    assert set(took) == {file.stem for file in (folder / "analysis" / "parts").iterdir()}
    assert all(t["seconds"] > 0 and t["peak_bytes"] > 2**26 for t in took.values())
    assert analysed(built, folder, params) == found and records.read_json(spent) == took
    assert sum(compilations.values()) == before


@pytest.mark.slow
def test_an_interrupted_analysis_ends_the_same(sequence, built, tmp_path):
    folder, found, params = sequence
    kept = [*(folder / "analysis" / "samples").glob("*.npz"), folder / "analysis" / "settings.json"]
    kept += [folder / "analysis" / "parts" / f"{name}.json" for name in ("edits", "point-base", "point-math")]
    for file in kept:
        records.write_bytes(tmp_path / file.relative_to(folder), file.read_bytes())
    again = analysed(built, tmp_path, params)
    assert again["damage"] == found["damage"] and again["gradients"] == found["gradients"]
    assert again["subspace"] == found["subspace"] and again["claims"] == found["claims"]


def test_another_setting_in_the_same_folder_is_refused(sequence, built):
    folder, _, params = sequence
    other = dataclasses.replace(built, config=small(group_size=2))
    with pytest.raises(UserError, match=r"analyze.group_size=4, now 2"):
        analysed(other, folder, params)


def test_what_cannot_be_analysed_is_refused_before_anything_runs(built):
    with pytest.raises(UserError, match="no stage before it"):
        interference.check(built, Checkpoints((), (), lambda name: None))
    many = dataclasses.replace(built, config=small(prompts=8000))
    with pytest.raises(UserError, match="prompts=8000"):
        interference.check(many, Checkpoints(STAGES, (), lambda name: None))


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory) -> dict[str, Path]:
    """A real base and two copies that torch has edited and written."""
    torch = pytest.importorskip("torch", reason="the copies are written by torch")
    transformers = pytest.importorskip("transformers")
    source = shared / "models" / "tinystories-656k"
    folders = {BASE: source}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    for name in ("code", "math"):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.01 * weight.std() * torch.randn_like(weight)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folders[name])
    return folders


@pytest.mark.slow  # 45 s; the other tests have the analysis, and test_own_models.py folders
@pytest.mark.usefixtures("fast_compile")
def test_anybodys_folders_give_the_figures_of_a_work_folder(exported, tmp_path, capsys):
    file = tmp_path / "small.py"
    # Without conflict subspaces, which are found at parameters that the other analyses have read.
    file.write_text(SMALL.replace("BUCKET", "48").replace("return c", "c.analyze.conflicts = 0\n    return c"))
    flags = [f"--config={file}", f"--config.model.path={exported[BASE]}"]

    ran = tmp_path / "ran"
    config = parse(dict(runtime_config(file, exported[BASE])))
    model = huggingface.read_config(exported[BASE])
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    decoder = runtime.Decoder(model)
    work = WorkFolder(ran)
    work.open(config)
    rows = {domain: [[0.0]] * 4 for domain in config.scored_domains}
    scored = {"seed": 0, "k": 1, "step": 1, "rewards": rows, "accuracy": rows}
    records.write_json(work.evaluation("00-base"), {"stage": "base", "index": 0} | scored)
    for stage in resolve_stages(config, ("code", "math"))[:2]:
        with StageCheckpoints(work.checkpoints(stage)) as checkpoints:
            params = huggingface.load(exported[stage.name], decoder, mesh)
            checkpoints.save(1, TrainState(np.int32(1), params, {"none": np.zeros(1)}), {})
        records.write_json(work.evaluation(stage.folder), {"stage": stage.name, "index": stage.index} | scored)
    assert main(["mdrl", "run", *flags, f"--workdir={ran}"]) == 0

    read = tmp_path / "read"
    stages = [f"--stage={name}:{exported[name]}" for name in ("code", "math")]
    status = main(["mdrl", "analyze", f"--base={exported[BASE]}", *stages, f"--config={file}", f"--workdir={read}"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert (read / "report" / "index.html").exists() and str(read / "report" / "index.html") in said.out
    for name in ("edits", "gradients", "routes", "damage", "subspace"):
        ours, theirs = (records.read_json(f / "analysis" / f"{name}.json") for f in (ran, read))
        for record in (ours, theirs):
            record.get("settings", {}).pop("sources", None)
        assert ours == theirs, name
    assert records.read_json(ran / "claims.json") == records.read_json(read / "claims.json")
    kl = records.read_json(read / "analysis" / "damage.json")["pairs"][0]["objectives"]["kl"]
    assert kl["predicted"]["estimate"] > 0


def runtime_config(file: Path, model: Path) -> Any:
    """The ConfigDict that the command line would make."""
    from mdrl_jax.config import from_file

    made = from_file(file)
    made.model.path = str(model)
    return made


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage=code:{base}"], "--base is missing"),
        (["--base={base}"], "--stage is missing"),
        (["--base={base}", "--stage=code"], "DOMAIN:FOLDER"),
        (["--base={base}", "--stage=poetry:{base}"], "DOMAIN one of code, math"),
        (["--base={base}", "--stage=code:{base}", "--stage=code:{base}"], "names code twice"),
        (["--base={base}", "--stage=code:{tiny}"], "a different config.json"),
    ],
)
def test_a_wrong_call_is_one_line(flags, message, shared, tmp_path, capsys):
    file = tmp_path / "small.py"
    file.write_text(SMALL.replace("BUCKET", "48"))
    places = {"base": shared / "models" / "tinystories-656k", "tiny": EMBEDDED_MODEL}
    flags = [flag.format(**places) for flag in flags]
    assert main(["mdrl", "analyze", *flags, f"--config={file}", f"--workdir={tmp_path / 'w'}"]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "w").exists()

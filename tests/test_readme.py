"""Tests of READMEs, docstrings and the notebook.

Their commands parse, their Python code runs, and their links lead to files.
"""

import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from mdrl_jax import config
from mdrl_jax.command_line import with_shipped
from mdrl_jax.domains.registry import DOMAINS, make_domains
from mdrl_jax.errors import UserError
from mdrl_jax.main import COMMANDS, POSITIONAL
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh
from mdrl_jax.rewards.base import resolve, score
from mdrl_jax.stage import resolve_stages
from tests.model.test_huggingface import assert_same_logits, torch
from tests.test_experiment import environment

ROOT = Path(__file__).parents[1]
# Folders of runs, builds and virtual environments, which are not part of the repository.
IGNORED = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
FOLDERS = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in IGNORED and not p.name.startswith(".")]
DOCUMENTS = {
    str(p.relative_to(ROOT)): p.read_text()
    for p in sorted([*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in folder.rglob("*.md"))])
}
READMES = [name for name in DOCUMENTS if name.endswith("README.md")]
TEXTS = {
    **{name: text for name, text in DOCUMENTS.items() if name != "CHANGELOG.md"},
    **{f"configs/{p.name}": p.read_text().split('"""')[1] for p in sorted((ROOT / "configs").glob("*.py"))},
    "colab": "\n".join(
        "".join(c["source"]) for c in json.loads((ROOT / "colab/quickstart.ipynb").read_text())["cells"]
    ),
}
# The document with the examples of an own domain, reward, model family and rollback rule; that with the smallest
# config; and that with the demonstrations of a data set.
OWN, SMALLEST, SHOWN = "CONTRIBUTING.md", "README.md", "mdrl_jax/domains/README.md"


def blocks(where: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[where], re.DOTALL | re.MULTILINE)


def typed(text: str) -> list[list[str]]:
    """The arguments of every command in a text, except commands with placeholders."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        hit = re.search(r"python -m mdrl_jax\.main (\S.*)", line)
        if hit and not re.search(r"COMMAND|…|\[-", hit[1]):
            found.append(shlex.split(re.split("[`#;]|&&", hit[1])[0]))
    return found


WRITTEN = [(where, arguments) for where, text in TEXTS.items() for arguments in typed(text)]


@pytest.mark.parametrize("where, arguments", WRITTEN, ids=[f"{w}:{' '.join(a)[:60]}" for w, a in WRITTEN])
def test_every_command_that_is_written_out_exists_with_its_flags(where: str, arguments: list[str]) -> None:
    name = arguments[0] if not arguments[0].startswith("-") else "run"
    about, define, _ = COMMANDS[name]
    given = [a for a in arguments[1 if name == arguments[0] else 0 :] if not re.fullmatch(r"\{\w+\}", a)]
    given = [re.sub(r"\$\w+|\{\w+\}", "1", a) for a in given]
    values = flags.FlagValues()
    own = {"--config=two_domains.py", "--config=small.py"}  # files that the texts themselves write
    given = [a for a in given if a not in own]
    given = with_shipped(given)  # refuses an absent file
    define(values, ["mdrl", *given])
    rest = values(["mdrl", *given])[1:]
    assert not rest or name in POSITIONAL


def test_there_are_commands_and_examples_to_check() -> None:
    texts = {where for where, _ in WRITTEN}
    assert len(WRITTEN) > 12 and texts >= {"README.md", "configs/compare.py", "colab"}
    assert texts >= {"configs/README.md", "tpu_scripts/README.md", "mdrl_jax/analysis/README.md"}
    counts = {where: n for where in DOCUMENTS if where in TEXTS and (n := len(blocks(where)))}
    assert counts == {OWN: 4, SMALLEST: 1, SHOWN: 1}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8000


def headings(text: str) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


LINK = re.compile(r"\]\(([^)\s]+)\)")


def targets(name: str) -> list[str]:
    """Relative links and images of a document; those to the web are left out."""
    return [link for link in LINK.findall(DOCUMENTS[name]) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_and_image_exists(name: str) -> None:
    for link in targets(name):
        path, _, anchor = link.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists() and file.is_relative_to(ROOT), f"{name} links to {link}"
        if anchor:
            assert anchor in headings(file.read_text()), f"{name} links to {link}"


def test_the_readme_links_to_every_document_and_all_images_are_used() -> None:
    linked = {str(((ROOT / "README.md").parent / link.partition("#")[0]).resolve()) for link in targets("README.md")}
    assert linked >= {str((ROOT / name).resolve()) for name in DOCUMENTS if name != "README.md"}
    shown = {((ROOT / name).parent / link).resolve() for name in READMES for link in targets(name)}
    assert shown >= {p.resolve() for p in (ROOT / ".images").iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Path:
    """A folder with the files of the examples in it."""
    folder = tmp_path_factory.mktemp("readme")
    for block in blocks(OWN):
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / named[1]).write_text(block)
    return folder


def test_the_smallest_config_is_valid() -> None:
    scope: dict[str, Any] = {}
    exec(blocks(SMALLEST)[0], scope)
    parsed = config.parse(scope["get_config"]())
    stages = resolve_stages(parsed, tuple(DOMAINS))
    assert [s.name for s in stages] == ["math", "qa", "refresh-math"] and set(parsed.scored_domains) == {"math", "qa"}
    assert [s.train.steps for s in stages] == [config.TrainSection().steps] * 2 + [4]


def test_the_template_of_replies_makes_demonstrations_that_earn_1(tmp_path: Path, monkeypatch: Any) -> None:
    scope: dict[str, Any] = {}
    exec(blocks(SHOWN)[0], scope)
    monkeypatch.chdir(tmp_path)
    row = re.search(r"# rows such as (\{.*\})", blocks(SHOWN)[0])
    assert row
    rows = [json.loads(row[1]), {"question": "And 4 * 6?", "equation": "4 * 6", "answer": "24"}]
    Path("sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parsed = config.parse(scope["get_config"]())
    stage = resolve_stages(parsed, tuple(DOMAINS))[1]
    assert (stage.kind, stage.start, stage.settings.target, stage.sft.length) == ("sft", "base", "solo-math", 256)
    domain = make_domains(("math",), parsed.domains)["math"]
    found = {p.prompt: p for split in ("train", "validation", "test") for p in getattr(domain, split)}
    assert {p.reply for p in found.values()} == {"2 + 3 = 5. The answer is 5.", "4 * 6 = 24. The answer is 24."}
    assert [score(resolve("math"), p.reply, p.check).reward for p in found.values()] == [1.0, 1.0]


def test_the_own_domain_trains(written: Path) -> None:
    command = [sys.executable, "-m", "mdrl_jax.main", "--config=two_domains.py", "--output=quiet"]
    # The shapes of the run in tests/test_experiment.py, whose compiled programs are kept.
    sizes = {"train.prompts_per_step": 4, "train.group_size": 4, "train.grad_accum_steps": 2, "evaluate.samples": 2}
    sizes |= {"evaluate.batch": 8, "rollout.prompt_buckets": "(12,)", "rollout.completion_buckets": "(16,)"}
    sizes |= {"train.steps": 1, "recover.prompts": 4}
    small = [f"--config.{name}={value}" for name, value in sizes.items()]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command + small, cwd=written, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (written / "runs/two_domains/scores.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["n_prompts"]) for r in rows if r["domain"] == "doubles"][-1] == ("refresh-math", 6)
    sys.path.insert(0, str(written))
    try:
        close = importlib.import_module("doubles").close
    finally:
        sys.path.remove(str(written))
    assert [close(reply, {"answer": 8}) for reply in ("8", "> 4 plus 4 ; 9", "7", "6", "many")] == [1, 0.5, 0.5, 0, 0]


def test_the_own_model_family_is_gemma(tmp_path: Path) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    from mdrl_jax.model import families, huggingface

    exec(next(b for b in blocks(OWN) if "GemmaForCausalLM" in b), {})
    try:
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        theirs = GemmaForCausalLM(GemmaConfig(**sizes, **heads, attn_implementation="eager")).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter += 0.15 * torch.randn_like(parameter)
        theirs.save_pretrained(tmp_path)
        assert_same_logits(tmp_path, theirs, make_mesh(MeshConfig(), jax.devices()[:1]))
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | {"sliding_window": 4}))
        with pytest.raises(UserError, match="sliding_window"):
            huggingface.read_config(tmp_path)
    finally:
        for table in (families.FAMILIES, families.DEFAULTS, families.ARCHITECTURES):
            table.pop("gemma", None)


def test_the_own_rule_takes_back_what_leads_away_from_the_peak() -> None:
    from mdrl_jax.recovery.rollback import rules
    from mdrl_jax.recovery.rollback.selection import largest
    from mdrl_jax.stages import rollback as rollback_stage

    recover = SimpleNamespace(rules=("removing", "against_the_peak"))
    runtime: Any = SimpleNamespace(config=SimpleNamespace(recover=recover))
    with pytest.raises(UserError, match="against_the_peak.*known: adding"):
        rollback_stage.check(runtime)
    exec(next(b for b in blocks(OWN) if "against_the_peak" in b), {})
    try:
        rollback_stage.check(runtime)
        edit = {"w": jnp.array([1.0, -2.0, 3.0, 0.5])}
        moved = {"w": jnp.array([1.0, -1.0, -1.0, 0.0])}
        scores = rules.SCORES["against_the_peak"](rules.Evidence(edit=edit, displacement=moved))
        np.testing.assert_array_equal(scores["w"], [1.0, 2.0, 0.0, 0.0])
        mask = largest(scores, 2, {"w": jnp.ones(4, bool)})
        back = rules.rollback({"w": jnp.zeros(4)}, edit, mask, 1.0)
        np.testing.assert_array_equal(back["w"], [-1.0, 2.0, 0.0, 0.0])
    finally:
        rules.SCORES.pop("against_the_peak", None)


WITH_EXAMPLES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in sorted((ROOT / "mdrl_jax").rglob("*.py"))
    if ">>> " in p.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (failed, tried > 0) == (0, True)

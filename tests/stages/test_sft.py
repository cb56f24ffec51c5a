"""Supervised stages: loss and gradient of torch `transformers`, which rows a step has, kills, costs, refusals."""

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from mdrl_jax import experiment
from mdrl_jax import runtime as runtime_module
from mdrl_jax.checkpoints import steps
from mdrl_jax.config import parse
from mdrl_jax.errors import UserError
from mdrl_jax.evaluate import Evaluation
from mdrl_jax.model import huggingface, tokens
from mdrl_jax.model.flops import matrix_weights
from mdrl_jax.parallel.sharding import make_mesh
from mdrl_jax.rl.rollouts import RolloutConfig
from mdrl_jax.rl.sft import SFTBatch, make_sft_loss
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, resolve_stages
from mdrl_jax.stages import sft, target
from tests.kills import timeless
from tests.odd_pool import OddPool

pytestmark = pytest.mark.usefixtures("fast_compile")
DOMAINS = ("code", "math", "qa", "cw")


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs on one of the tests' eight devices, and without reward processes."""
    monkeypatch.setattr(runtime_module, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
    monkeypatch.setattr(runtime_module, "make_pool", lambda section: OddPool())
    yield


def fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of supervised stages on the small model."""
    return {
        "stages": ("sft-math",),
        "scored_domains": DOMAINS,
        "model": {"path": str(folder), "weights": "random"},
        "rollout": {"prompt_buckets": (12,), "completion_buckets": (4, 12)},
        "sft": {"steps": 4, "batch_size": 8, "grad_accum_steps": 2, "length": 26, "learning_rate": 0.01},
        "domains": {"n_test": 8, "n_validation": 8},
        "evaluate": {"batch": 8, "samples": 1},
        "recover": {"prompts": 8, "samples": 2},
    } | changes


def built(folder: Path, **changes: Any) -> tuple[Runtime, dict[str, Stage]]:
    config = parse(fields(folder, **changes))
    pool: Any = OddPool()
    made = runtime_module.build(config, pool)
    return made, {s.name: s for s in resolve_stages(config, DOMAINS)}


def data_set(path: Path, n: int = 40, reply: str = "{a}") -> dict[str, Any]:
    """A section `domains` with Math from a file; row i has a reply of i + 1 tokens."""
    rows = [{"q": f"number {i}", "a": " ".join(["x"] * (i + 1))} for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"files": (str(path),), "prompt": "{q}", "check": {"answer": "a"}, "reward": "qa", "reply": reply}
    return {"math": source, "n_test": 2, "n_validation": 2}


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


# --- loss and gradient ------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_torch_with_labels_of_the_reply_alone(
    tiny_models: dict[str, Any], tmp_path: Path
):
    """`transformers` averages over all labels that are not -100. Its rows have less padding, which changes nothing."""
    torch = pytest.importorskip("torch", reason="the oracle is torch")
    llama = tiny_models["llama"]
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 96, n).tolist() for n in (9, 5, 7)]
    n_reply = np.array([4, 1, 6])
    loss = make_sft_loss(llama.model)

    def total(params: Any, length: int) -> jax.Array:
        tokens_BT, valid_BT = tokens.left_pad(rows, length, 0)
        mask_BT = (length - np.arange(length)[None] <= n_reply[:, None]).astype(np.float32)
        summed, (count, _) = loss(params, SFTBatch(tokens_BT, valid_BT, mask_BT))
        return summed / count

    value, grads = jax.jit(jax.value_and_grad(total), static_argnums=1)(llama.params, 12)
    huggingface.save(tmp_path / "model", llama.params, llama.config)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    tokens_BT, valid_BT = tokens.left_pad(rows, 9, 0)
    labels_BT = np.where(9 - np.arange(9)[None] <= n_reply[:, None], tokens_BT, -100)
    made = oracle(
        torch.tensor(tokens_BT, dtype=torch.long),
        attention_mask=torch.tensor(valid_BT, dtype=torch.long),
        position_ids=torch.tensor(np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)),
        labels=torch.tensor(labels_BT, dtype=torch.long),
    ).loss
    assert float(value) == pytest.approx(made.item(), abs=1e-5)
    made.backward()
    ours = {name: read() for name, read in huggingface.to_tensors(grads).items()}
    theirs = {name: p.grad.numpy() for name, p in oracle.named_parameters()}
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, atol=2e-5, rtol=0, err_msg=name)
    assert max(np.abs(g).max() for g in theirs.values()) > 0.1


# --- the rows of a step -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_device")
def test_a_batch_has_prompt_and_reply_and_the_mask_has_the_reply_alone(small_folder: Path, tmp_path: Path):
    made, stages = built(small_folder, domains=data_set(tmp_path / "a.jsonl"), scored_domains=("math",))
    stage, tokenizer = stages["sft-math"], made.tokenizer
    prompts, lengths = made.prompts["math", "train"], set()
    by_prompt = {tokenizer.decode(p): r.reply for p, r in zip(prompts.tokens, prompts.problems, strict=True)}
    for step in range(4):
        found = sft.batch(made, stage, step)
        lengths.add(found.tokens_BT.shape[1])
        for row, valid, mask in zip(found.tokens_BT, found.valid_BT, found.mask_BT, strict=True):
            assert not row[~valid].any() and (np.diff(valid.astype(int)) >= 0).all()
            assert (np.diff(mask) >= 0).all() and mask[-1] == 1
            prompt, reply = tokenizer.decode(row[valid & (mask == 0)]), tokenizer.decode(row[mask == 1])
            assert reply == f"{by_prompt[prompt]} {tokenizer.eos_token}"
    # "User: number i", "Assistant:" and the end token are 6 tokens: rows of 7 to 26 of them are drawn.
    assert lengths <= {16, 24, 26} and max(lengths) > 16
    rows = made.demonstrations("math", 26).rows
    assert max(len(prompts.tokens[i]) + len(prompts.problems[i].reply.split()) + 1 for i in rows) <= 26


def test_rows_are_padded_to_sums_of_the_rollouts_buckets():
    rollout = RolloutConfig(prompt_buckets=(8, 16), completion_buckets=(4, 12))
    assert sft.lengths(rollout, 24) == (12, 20, 24)
    assert sft.lengths(rollout, 11) == (11,)
    assert sft.lengths(rollout, 40) == (12, 20, 28, 40)


@pytest.mark.usefixtures("one_device")
def test_a_step_of_all_domains_has_evenly_many_rows_of_each(small_folder: Path):
    made, stages = built(small_folder, stages=("sft",))
    found = sft.batch(made, stages["sft"], 0)
    prompts = {p for d in DOMAINS for p in (made.tokenizer.decode(ids) for ids in made.prompts[d, "train"].tokens)}
    shown = [made.tokenizer.decode(r[v & (m == 0)]) for r, v, m in zip(*jax.tree.leaves(found), strict=True)]
    of = [
        [d for d in DOMAINS if any(made.tokenizer.decode(i) == s for i in made.prompts[d, "train"].tokens)]
        for s in shown
    ]
    assert of == [[d] for d in DOMAINS] * 2 and set(shown) <= prompts


@pytest.mark.usefixtures("one_device")
def test_rows_depend_on_seed_stage_and_step_alone(small_folder: Path):
    made, stages = built(small_folder, stages=("sft-math", "sft"))
    other, _ = built(small_folder, stages=("sft-math", "sft"), seed=1)
    again, _ = built(small_folder, stages=("sft-math", "sft"))
    stage = stages["sft-math"]
    first = sft.batch(made, stage, 2)
    assert same(first, sft.batch(again, stage, 2))
    alone = dataclasses.replace(stages["sft"], domains=("math",))
    for different in (sft.batch(made, stage, 1), sft.batch(other, stage, 2), sft.batch(made, alone, 2)):
        assert first.tokens_BT.shape != different.tokens_BT.shape or not same(first, different)


def pretrained_before(made: Runtime, stage: Stage, step: int) -> SFTBatch:
    """The batch of a stage `pretrain` as the version that made the embedded model drew it."""
    section = made.config.sft
    rng = random.Random(f"{made.config.seed}/{stage.name}/{step}")
    noise = section.noise if step >= section.noise_from * section.steps else 0.0
    prompts, replies = [], []
    for i in range(section.batch_size):
        domain = made.domains[stage.domains[i % len(stage.domains)]]
        assert domain.demonstrate
        problem = rng.choice(domain.pretraining)
        prompts.append(problem.prompt)
        replies.append(domain.demonstrate(problem, rng, noise))
    reply_ids = [[*ids, made.rollouts.eos_ids[0]] for ids in made.tokenizer(replies).input_ids]
    rows = [[*p, *r] for p, r in zip(made.tokenizer(prompts).input_ids, reply_ids, strict=True)]
    tokens_BT, valid_BT = tokens.left_pad(rows, section.length, made.rollouts.pad_id)
    from_end = section.length - np.arange(section.length)[None, :]
    return SFTBatch(
        tokens_BT, valid_BT, (from_end <= np.array([len(r) for r in reply_ids])[:, None]).astype(np.float32)
    )


@pytest.mark.usefixtures("one_device")
def test_a_pretraining_draws_what_it_always_drew(small_folder: Path):
    changes = {"steps": 10, "batch_size": 13, "length": 22, "noise": 0.5, "noise_from": 0.5}
    made, stages = built(small_folder, stages=("pretrain",), sft=changes, rollout={"prompt_buckets": (12,)})
    for step in (0, 9):
        assert same(sft.batch(made, stages["pretrain"], step), pretrained_before(made, stages["pretrain"], step))


@pytest.mark.usefixtures("one_device")
def test_only_a_pretraining_sees_held_out_facts(small_folder: Path):
    made, stages = built(small_folder, stages=("pretrain", "sft", "sft-qa"))
    shown = {name: {p.prompt for p in sft.shown(made, stage)[-1].problems} for name, stage in stages.items()}
    assert stages["sft-qa"].domains == ("qa",) and shown["sft-qa"] == {p.prompt for p in made.domains["qa"].train}
    all_qa = {name: {p.prompt for p in sft.shown(made, stages[name])[2].problems} for name in ("pretrain", "sft")}
    assert all_qa["sft"] == shown["sft-qa"] < all_qa["pretrain"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_device")
def test_what_cannot_be_trained_on_is_told_before_anything_runs(small_folder: Path, tmp_path: Path):
    def told(path: str = "a.jsonl", reply: str = "{a}", **changes: Any) -> str:
        domains = data_set(tmp_path / path, reply=reply)
        made, stages = built(small_folder, domains=domains, scored_domains=("math",), **changes)
        with pytest.raises(UserError) as caught:
            sft.check(made, stages["sft-math"])
        return str(caught.value)

    assert told(reply="").startswith(
        "stage sft-math: domain math has no replies to train on; set domains.math.reply to"
    )
    wanted = r"stage sft-math: all of \d\d demonstrations of math are longer than sft.length=4 tokens; raise it"
    assert re.fullmatch(wanted, told(sft={"length": 4}))
    assert told(sft={"length": 5000}).startswith("stage sft-math: sft.length=5000, but the model allows")
    made, stages = built(small_folder, domains=data_set(tmp_path / "b.jsonl"), scored_domains=("math",))
    (record,) = sft.check(made, stages["sft-math"]).values()
    lengths = [len(p.reply.split()) + 6 for p in made.prompts["math", "train"].problems]
    assert (record["prompts"], record["too_long"]) == (len(lengths), sum(n > 26 for n in lengths))
    procedural, stages = built(small_folder, sft={"length": 8, "batch_size": 8})
    with pytest.raises(UserError, match=r"stage sft-math: sft.length=8 is too short for the \d\d tokens of '\d "):
        sft.batch(procedural, stages["sft-math"], 0)


def test_rows_that_the_mesh_does_not_divide_are_refused(small_folder: Path):
    made, stages = built(small_folder)
    with pytest.raises(
        UserError, match=r"stage sft-math: sft.batch_size / sft.grad_accum_steps = 4 is not .* fsdp = 8"
    ):
        sft.check(made, stages["sft-math"])


# --- whole runs -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def params_of(workdir: Path, folder: str) -> Any:
    """All arrays of the last checkpoint of a stage, as bytes by file."""
    last = workdir / "checkpoints" / folder / str(steps(workdir / "checkpoints" / folder)[-1])
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        return reader.restore((last / "state" / "params").absolute())


def read(workdir: Path, name: str) -> Any:
    return json.loads((workdir / f"{name}.json").read_text())


@pytest.mark.usefixtures("one_device")
def test_a_killed_run_ends_as_if_it_had_not_been(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SFT on a data set, then SFT with a target that it does not reach, killed after its first look."""
    overrides = {"sft": {"target": "sft-math", "target_every": 2, "steps": 5, "checkpoint_every": 1}}
    changes = fields(
        small_folder,
        stages=("sft-math", "sft"),
        scored_domains=("math",),
        domains=data_set(tmp_path / "a.jsonl"),
        sft=fields(small_folder)["sft"] | {"checkpoint_every": 1, "length": 16},
        stage_overrides=overrides,
    )
    config = parse(changes)

    def score(runtime: Runtime, params: Any, domains: Any) -> dict[str, np.ndarray]:
        """A score that falls with the distance from the base model."""
        far = float(jnp.linalg.norm(params["embedding"] - base["embedding"]))
        scored.append(far)
        return {"math": np.full((8, 2), 1 / (1 + far), np.float32)}

    scored: list[float] = []
    pool: Any = OddPool()
    base = runtime_module.build(config, pool).base_params()
    monkeypatch.setattr(Runtime, "base_params", lambda self: jax.tree.map(jnp.copy, base))  # drawn once
    monkeypatch.setattr(target, "validation_rewards", score)
    # Scores after a stage, and compiled programs, are not what is tested here.
    told = Evaluation({"math": np.ones((2, 1), np.float32)}, {"math": np.ones((2, 1), np.float32)}, [], {})
    monkeypatch.setattr(experiment, "evaluate", lambda *_: told)
    made = sft.make_programs(runtime_module.build(config, pool), config.sft.optimizer)
    monkeypatch.setattr(sft, "make_programs", lambda runtime, optimizer, *_: made)
    monkeypatch.setattr("mdrl_jax.report.page.write", lambda root: None)
    monkeypatch.setattr("mdrl_jax.report.tensorboard.save_figures", lambda root: None)
    experiment.run(config, tmp_path / "whole", "quiet")
    real, asked = sft.batch, []

    def killing(runtime: Runtime, stage: Stage, step: int) -> SFTBatch:
        if (stage.name, step) in moments:
            moments.remove((stage.name, step))
            raise Killed
        asked.append((stage.name, step))
        return real(runtime, stage, step)

    monkeypatch.setattr(sft, "batch", killing)
    moments = [("sft-math", 2), ("sft", 3)]
    for _ in range(2):
        with pytest.raises(Killed):
            experiment.run(config, tmp_path / "killed", "quiet")
    experiment.run(config, tmp_path / "killed", "quiet")
    assert not moments and asked[:4] == [("sft-math", i) for i in range(4)]
    for folder in ("01-sft-math", "02-sft"):
        assert same(*(params_of(tmp_path / run, folder) for run in ("whole", "killed")))
        costs = [read(tmp_path / run, f"costs/{folder}") for run in ("whole", "killed")]
        assert costs[0]["tokens_trained"] == costs[1]["tokens_trained"] > 0
    looks = [read(tmp_path / run, "targets/02-sft") for run in ("whole", "killed")]
    assert timeless(looks[0]) == timeless(looks[1]) and [row["step"] for row in looks[0]["steps"]] == [2, 4, 5]
    assert scored[:4] == scored[4:]  # the target and each look once, although a kill came between two of them
    record = read(tmp_path / "whole", "data")["math"]["demonstrations"]["sft-math"]
    shown = " ".join((tmp_path / "whole" / "log.txt").read_text().split())
    assert f"{record['prompts'] - record['too_long']} of {record['prompts']} training prompts have a demons" in shown
    cost, weights = read(tmp_path / "whole", "costs/01-sft-math"), matrix_weights(huggingface.read_config(small_folder))
    assert (cost["kind"], cost["steps"], cost["tokens_sampled"]) == ("sft", 4, 0)
    assert cost["flops"] == 6 * weights * cost["tokens_trained"]
    rows = [int(real_batch.valid_BT.sum()) for real_batch in (real(*drawn) for drawn in drawn_of(config))]
    assert cost["tokens_trained"] == sum(rows)


def drawn_of(config: Any) -> list[tuple[Runtime, Stage, int]]:
    """The arguments of `sft.batch` for every step of the first stage of a run."""
    pool: Any = OddPool()
    made = runtime_module.build(config, pool)
    stage = resolve_stages(config, DOMAINS)[0]
    return [(made, stage, step) for step in range(stage.sft.steps)]

"""Several processes of two devices each against one process with as many devices, and the loss of one of them."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import several
from flax import linen as nn

from mdrl_jax import config, runtime
from mdrl_jax.checkpoints import StageCheckpoints, abstract
from mdrl_jax.config import EMBEDDED_MODEL
from mdrl_jax.evaluate import evaluate
from mdrl_jax.model import huggingface
from mdrl_jax.model.transformer import Decoder, param_shapes
from mdrl_jax.parallel.distributed import AGAIN, LOST
from mdrl_jax.parallel.preemption import STATUS
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, param_shardings
from tests import compiled

ROOT = Path(__file__).parents[2]
TIMEOUT = 10.0  # seconds after which a lost process ends the others


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(commands: Sequence[Sequence[str]], logs: Path) -> list[subprocess.Popen[bytes]]:
    """One process a command, of two devices each; what they say goes to `logs`-N.txt."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    # A restart, and every other process, finds what one of them has compiled.
    settings |= {"JAX_COMPILATION_CACHE_DIR": os.environ[compiled.FOLDER], "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    made = []
    for i, command in enumerate(commands):
        with open(f"{logs}-{i}.txt", "wb") as log:
            made.append(
                subprocess.Popen(
                    [sys.executable, *command], stdout=log, stderr=log, env={**os.environ, **settings}, cwd=ROOT
                )
            )
    return made


@pytest.mark.slow  # that several processes sample what one does is part of the test of a notice
@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("processes, curvature", [(2, False), (2, True), (4, True)])
def test_several_processes_compute_what_one_does(
    processes: int, curvature: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    where = f"localhost:{free_port()}"
    script = str(ROOT / "tests" / "parallel" / "several.py")
    commands = [[script, str(tmp_path), where, str(processes), str(i), str(curvature)] for i in range(processes)]
    started = start(commands, tmp_path / "log")
    devices = jax.devices()[: 2 * processes]
    monkeypatch.setattr("mdrl_jax.runtime.make_mesh", lambda config: make_mesh(config, devices))
    one = several.measure(several.small(data=processes, fsdp=2), curvature)
    assert [p.wait(timeout=400) for p in started] == [0] * processes, (tmp_path / "log-0.txt").read_text()[-2000:]
    with np.load(tmp_path / several.FOUND) as found:
        assert set(found.files) == set(one)
        for name, expected in one.items():
            if np.issubdtype(expected.dtype, np.floating) and "rewards" not in name:
                # Adam divides by a gradient's own size, rounding of tiny ones included: a share of the learning rate.
                atol = 0.05 * several.RATE if "updated" in name else 2e-5 * np.abs(expected).max()
                np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=atol, err_msg=name)
            else:  # tokens, lengths, rewards: what was sampled is the same
                np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert one["['step']['tokens']"] > 0
    assert not curvature or np.abs(one["['lanczos']['values']"]).max() > 0


CHANGES = {
    "stages": "('math',)",
    "scored_domains": "('math', 'qa')",
    "mesh.fsdp": "2",
    "domains.n_train": "32",
    "domains.n_test": "16",
    "domains.n_validation": "8",
    "evaluate.batch": "16",
    "train.steps": "6",
    "train.checkpoint_every": "1",
    "train.group_size": "4",
}


def run(workdir: Path, again: str = "") -> list[subprocess.Popen[bytes]]:
    """A small run of two processes."""
    flags = [f"--config.{name}={value}" for name, value in CHANGES.items()]
    where = ["--coordinator", f"localhost:{free_port()}", "--processes=2", f"--host_timeout={TIMEOUT}"]
    command = ["-m", "mdrl_jax.main", f"--config={workdir.parent / 'small.py'}", *flags, f"--workdir={workdir}", *where]
    return start([[*command, f"--process_id={i}"] for i in range(2)], workdir.parent / f"{workdir.name}{again}")


def until_step(step: int, workdir: Path, again: str = "") -> list[subprocess.Popen[bytes]]:
    """The same, once the checkpoint of a step is there."""
    made = run(workdir, again)
    while not (workdir / "checkpoints" / "01-math" / str(step)).exists():
        assert made[0].poll() is None, Path(f"{workdir}{again}-0.txt").read_text()[-2000:]
        time.sleep(0.02)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are made; it has their config file."""
    made = tmp_path_factory.mktemp("runs")
    text = "from mdrl_jax import config\n\ndef get_config():\n    c = config.default()\n"
    text += "    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (8,)\n    return c\n"
    (made / "small.py").write_text(text)
    return made


def disturb(workdir: Path) -> None:
    """A run of which one process gets a SIGTERM; started again, one of its processes is killed."""
    told = until_step(2, workdir)
    told[1].send_signal(signal.SIGTERM)
    assert [p.wait(timeout=60) for p in told] == [STATUS, STATUS]
    assert re.search("stopped by SIGTERM (after|during) step", Path(f"{workdir}-0.txt").read_text())

    first, second = until_step(4, workdir, "-again")
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert first.wait(timeout=10 * TIMEOUT) == LOST, Path(f"{workdir}-again-0.txt").read_text()[-2000:]
    assert time.monotonic() - killed < 3 * TIMEOUT
    said = Path(f"{workdir}-again-0.txt").read_text().splitlines()
    assert any("math: goes on after step" in line for line in said)
    name = f"process 1 on {socket.gethostname()}"
    assert f"mdrl: error: {name} gave no sign of life for {TIMEOUT:.0f} s; {AGAIN}" in said
    second.wait()
    assert not (workdir / "evaluations" / "01-math.json").exists()


@pytest.mark.slow  # 66 s; test_distributed.py has what ends one process and what a lost one does
@pytest.mark.usefixtures("fast_compile")
def test_a_notice_stops_all_at_the_same_step_and_a_lost_process_ends_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The base is scored on the same completions as in one process with as many devices."""
    disturb(folder / "cut")
    made = config.from_file(folder / "small.py")
    made.update_from_flattened_dict({name: ast.literal_eval(value) for name, value in CHANGES.items()})
    monkeypatch.setattr("mdrl_jax.runtime.make_mesh", lambda section: make_mesh(section, jax.devices()[:4]))
    parsed = config.parse(made)
    with runtime.make_pool(parsed.rewards) as pool:
        built = runtime.build(parsed, pool)
        with jax.set_mesh(built.mesh):
            one = evaluate(built, built.base_params(), "scores", several._untold).record()
    several_processes = json.loads((folder / "cut/evaluations/00-base.json").read_text())
    assert several_processes["rewards"] == one["rewards"] and np.mean(one["rewards"]["math"]) > 0


@pytest.mark.slow  # a run of one process shows the same in tests/test_kills.py
def test_a_disturbed_run_of_several_processes_ends_as_one_that_nothing_disturbed(folder: Path):
    whole, cut = folder / "whole", folder / "disturbed"
    assert [p.wait(timeout=300) for p in run(whole)] == [0, 0], (folder / "whole-0.txt").read_text()[-2000:]
    disturb(cut)
    assert [p.wait(timeout=300) for p in run(cut, "-end")] == [0, 0]
    assert "math: goes on after step" in Path(f"{cut}-end-0.txt").read_text()
    for file in ("scores.jsonl", "evaluations/01-math.json", "samples/01-math.jsonl"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
    for a, b in zip(*(jax.tree.leaves(params(made)) for made in (whole, cut)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def params(workdir: Path) -> Any:
    """Parameters at the end of the run, on one device."""
    model = Decoder(huggingface.read_config(EMBEDDED_MODEL))
    boxed = param_shapes(model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with StageCheckpoints(workdir / "checkpoints" / "01-math") as checkpoints:
        return checkpoints.restore_params(abstract(nn.unbox(boxed), param_shardings(mesh, boxed)))

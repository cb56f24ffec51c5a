"""Rates and their ratios by hand, training loops a step at a time, and the sides of a comparison on a tiny model."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from mdrl_jax.bench import start, step, train
from mdrl_jax.bench.measure import rounds
from mdrl_jax.bench.speed import Entry, Stepped, records, table
from mdrl_jax.bench.work import Work, torch_model
from mdrl_jax.config import EMBEDDED_MODEL
from mdrl_jax.errors import UserError

SECONDS = {"ours": np.array([2.0, 2.0, 4.0]), "theirs": np.array([10.0, 12.0, 30.0])}
ENTRIES = [
    Entry("ours", 64, "tokens"),
    Entry("theirs", 32, "tokens", faster="ours", least=10.0, packages=("numpy",)),
    Entry("absent", reason="absent is not installed"),
]


def test_a_ratio_is_that_of_median_rates():
    ours, theirs, absent = records("b", ENTRIES, SECONDS)
    assert (ours["seconds"], ours["rate"], ours["ratio"], ours["repeats"]) == (2.0, 32.0, None, 3)
    # Half the work in six times the time; each round's own ratio lies between 10 and 15.
    assert theirs["ratio"] == 2 * 12 / 2
    low, high = theirs["ratio_ci95"]
    assert 10 <= low <= theirs["ratio"] <= high <= 15
    assert theirs["versions"] == {"numpy": np.__version__}
    assert absent["reason"] and absent["seconds"] is None and absent["versions"] is None
    json.dumps([ours, theirs, absent])


def test_the_table_says_which_aims_are_met():
    def shown(**aim: float) -> str:
        found = records("b", [ENTRIES[0], Entry("theirs", 32, "tokens", "ours", **aim), ENTRIES[2]], SECONDS)
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        console.print(table("title", found))
        return console.file.getvalue()  # type: ignore

    green, red = "\x1b[32m12.00", "\x1b[31m12.00"
    assert green in shown(least=10.0) and red in shown(least=13.0)
    assert green in shown(most=13.0) and red in shown(most=11.0)
    assert "absent: absent is not installed" in shown() and "32 tokens/s" in shown()


def test_a_training_loop_makes_one_step_at_a_time():
    made: list[int] = []

    def loop(stepped: Stepped) -> None:
        for i in range(3):
            stepped.wait()
            made.append(i)
            stepped.done()

    call = Stepped(loop)
    for n in range(3):
        assert made == list(range(n))
        call()
    with pytest.raises(UserError, match="ended before"):
        call()

    def broken(stepped: Stepped) -> None:
        stepped.wait()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Stepped(broken)()


@pytest.mark.slow
def test_a_step_samples_scores_and_updates():
    work = Work(EMBEDDED_MODEL, prompts=8, group=2, length=2, prompt=12)
    with step.ours(work) as (tasks, (entry,)):
        tasks[entry.what].call()
        assert entry.amount == 16


@pytest.mark.slow
def test_a_peer_that_cannot_be_imported_is_one_line(monkeypatch):
    """transformers imports a model's class at its first use, and this may fail beside a package that does not match."""
    pytest.importorskip("torch", reason="torch is the peer")
    import transformers

    def fails(*args, **kwargs):
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(UserError, match="LlamaConfig.*such as torchvision"):
        torch_model(EMBEDDED_MODEL)


def test_a_gradient_is_timed_beside_that_of_torch():
    pytest.importorskip("torch", reason="torch is the peer")
    sides = [f(Work(EMBEDDED_MODEL, prompts=1, group=2, length=2, prompt=3)) for f in (train.ours, train.torch)]
    tasks = {name: task for made, _ in sides for name, task in made.items()}
    found = records("train", [entry for _, made in sides for entry in made], rounds(tasks, 1, lambda text: None))
    assert [record["rate"] > 0 for record in found] == [True] * 3
    assert found[2]["ratio"] == pytest.approx(found[1]["rate"] / found[2]["rate"])


def test_a_run_that_ends_before_its_first_step_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start.sys, "executable", "/bin/false")
    made, _ = start.tasks("/tmp")
    for task in made.values():
        with pytest.raises(UserError):
            task.call()

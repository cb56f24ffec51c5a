"""What a command shows: progress and its time left, output modes, JSON lines, the final screen."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdrl_jax import main as main_module
from mdrl_jax.progress import Step, printable
from mdrl_jax.report.screen import analysis, outputs, terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.report.screen.outputs import OUTPUTS, WIDTH, JsonLines, Lines, Quiet, Terminal, plain, screen
from mdrl_jax.report.tables.matrix import build

ESCAPES = re.compile(r"[\x1b\r]")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(step: Step, clock: Clock, *reports: tuple[float, int]) -> float | None:
    """Time left after reports at these seconds."""
    for clock.now, done in reports:
        step.report(done, "at it")
    return step.left()


# --- time left --------------------------------------------------------------------------------------------------------


def test_time_left_is_that_of_the_other_pieces_at_the_pace_so_far():
    clock = Clock()
    step = Step("code", 10, clock)
    assert step.left() is None and told(step, clock, (3.0, 0)) is None
    assert told(step, clock, (63.0, 1)) == 9 * 60  # all there is to go by
    assert told(step, clock, (65.0, 2)) == 8 * 2  # the first piece compiled; it no longer counts
    assert told(step, clock, (71.0, 4)) == pytest.approx(6 * 8 / 3)
    clock.now += 10  # in the middle of a piece
    assert step.left() == pytest.approx(6 * 8 / 3 - 10)
    clock.now += 100
    assert step.left() == 0
    assert told(step, clock, (200.0, 10)) == 0


def test_what_was_done_before_a_resume_is_not_taken_for_speed():
    clock = Clock()
    step = Step("trials", 100, clock)
    assert told(step, clock, (0.0, 90)) is None
    assert told(step, clock, (10.0, 91)) == 9 * 10
    assert told(step, clock, (14.0, 92)) == 8 * 4


def test_the_run_takes_at_least_as_long_as_the_step_it_is_in():
    clock, console = Clock(), Screen(None)
    step = Step("code", 10, clock)
    told(step, clock, (0.0, 0), (60.0, 1))
    console.stage(3, 5, 100.0)
    assert console._overall(step) == "  [stage 3 of 5, run 0:12:20 left]"  # 9 pieces of 60 s, 2 stages of 100 s
    told(step, clock, (61.0, 10))
    assert re.fullmatch(r"  \[stage 3 of 5, run 0:0(5:00|4:5\d) left\]", console._overall(step))


def test_reports_within_a_piece_change_the_text_alone():
    clock = Clock()
    step = Step("sweep", 4, clock)
    before = told(step, clock, (0.0, 0), (5.0, 1), (8.0, 1))
    assert before == 3 * 5 - 3 and step.text == "at it"
    clock.now = 9.0
    step.report(1, "another")
    assert step.left() == 3 * 5 - 4 and step.line() == "sweep 1/4  another  0:00:11 left"


def test_pieces_longer_than_half_a_minute_have_a_time_left(tmp_path: Path):
    """rich's own estimate has none for them."""
    clock = Clock()
    step = Step("slow", 3, clock)
    told(step, clock, (0.0, 0), (600.0, 1), (1100.0, 2))
    with Terminal().watch(step):
        pass
    assert outputs._TimeLeft(step).render(None).plain == "0:08:20 left"  # type: ignore


# --- modes ------------------------------------------------------------------------------------------------------------


def show_all(log: Path | None, output: str) -> None:
    """A command's life: text, a warning, a table, steps short and long, events, and the end."""
    table = Table(title="scores")
    table.add_column("stage")
    table.add_row("code [1]")
    with Screen(log, output) as seen:
        seen.print(Text("begun [1, 2]", style="bold"))
        seen.warn("rule [x] left out")
        seen.print(table)
        with seen.steps("nothing to do", 0) as show:
            show(0, "")
        with seen.steps("sweep", 3) as show:
            for i in range(3):
                show(i, f"point [{i}]")
        assert list(seen.track("code", 4, 2, [(3, "a", "x"), (4, "b", "y")])) == ["x", "y"]
        seen.event("scores", rows=[{"stage": "code", "score": 1.5, "stderr": float("nan")}])
        seen.print("the end", final=True)
        seen.event("done", seconds=1.0, workdir="here")


@pytest.fixture
def logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str, str]]:
    """(standard output, standard error, log.txt) of the same in each mode."""
    found = {}
    for output in OUTPUTS:
        show_all(tmp_path / output / "log.txt", output)
        found[output] = (*capsys.readouterr(), (tmp_path / output / "log.txt").read_text())
    return found


def test_the_log_is_the_same_in_all_modes_and_has_no_progress(logs: dict[str, tuple[str, str, str]]):
    (log,) = {log for _, _, log in logs.values()}
    assert not ESCAPES.search(log)
    assert [line.strip() for line in log.splitlines() if "code [1]" not in line and line.strip(" ━┃┏┓┡╇┩│└┘─┴")] == [
        "begun [1, 2]",
        "warning: rule [x] left out",
        "scores",
        "┃ stage    ┃",
        "the end",
    ]
    assert logs["screen"][0] == log and logs["screen"][1] == ""


def test_a_line_of_text_stays_whole_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = "written to " + "a very long folder " * 20 + "and no further"
    with Screen(tmp_path / "log.txt") as seen:
        seen.print(long)
    assert capsys.readouterr().out == long + "\n" == (tmp_path / "log.txt").read_text()


def test_quiet_shows_the_end_and_warns_on_standard_error(logs: dict[str, tuple[str, str, str]]):
    assert logs["quiet"][:2] == ("the end\n", "warning: rule [x] left out\n")


def test_every_line_of_json_is_an_event(logs: dict[str, tuple[str, str, str]]):
    out, err, _ = logs["json"]
    events = [json.loads(line) for line in out.splitlines()]
    assert err == "" and out.endswith("\n") and "NaN" not in out
    assert all(e["event"] in ("message", "progress", "scores", "done") for e in events)
    assert all(abs(e["time"] - time.time()) < 60 for e in events)
    texts = [e["text"] for e in events if e["event"] == "message"]
    assert texts == ["begun [1, 2]", "warning: rule [x] left out", "   scores\n stage\n code [1]", "the end"]
    progress = [{k: v for k, v in e.items() if k not in ("event", "time")} for e in events if e["event"] == "progress"]
    sweep, code = ([p for p in progress if p["label"] == label] for label in ("sweep", "code"))
    assert len(sweep) + len(code) == len(progress)
    assert sweep[0] == {"label": "sweep", "done": 0, "total": 3, "text": "point [0]", "seconds_left": None}
    assert sweep[-1] == {"label": "sweep", "done": 3, "total": 3, "text": "point [2]", "seconds_left": 0.0}
    assert code[0]["done"] == 2 and code[-1]["done"] == 4 and code[-1]["text"] == "b"
    assert len(sweep) <= 3 and len(code) <= 3  # it took less than a second
    (scores,) = [e for e in events if e["event"] == "scores"]
    assert scores["rows"] == [{"stage": "code", "score": 1.5, "stderr": None}]
    assert events[-1] | {"time": 0} == {"event": "done", "time": 0, "seconds": 1.0, "workdir": "here"}


def test_progress_events_come_at_most_once_a_second(capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr(outputs, "EVENT_SECONDS", 0.1)
    with Screen(None, "json") as seen, seen.steps("long", 40) as show:
        for i in range(40):
            show(i, "at it")
            time.sleep(0.01)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 3 <= len(lines) <= 12 and lines[-1]["done"] == 40
    assert all(b["time"] - a["time"] >= 0.09 for a, b in zip(lines[:-2], lines[1:-1], strict=True))
    left = [line["seconds_left"] for line in lines[2:]]
    assert left == sorted(left, reverse=True) or max(abs(a - b) for a, b in zip(left, left[1:], strict=False)) < 0.3


def test_a_step_that_fails_or_ends_early_says_how_far_it_came(capsys: pytest.CaptureFixture[str]):
    with Screen(None, "json") as seen:
        with pytest.raises(RuntimeError), seen.steps("sweep", 5) as show:
            show(2, "at it")
            raise RuntimeError
        for value in seen.track("refresh", 5, 0, [(1, "a", 1), (2, "b", 2), (3, "c", 3)]):
            if value == 2:
                break
    ends = {e["label"]: e["done"] for e in map(json.loads, capsys.readouterr().out.splitlines())}
    assert ends == {"sweep": 2, "refresh": 2}


def test_a_log_on_a_pod_shows_life_even_within_a_piece(capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr(outputs, "LINE_SECONDS", 0.1)
    with Screen(None) as seen, seen.steps("code", 4) as show:
        show(1, "[compiling]")
        time.sleep(0.35)
        show(2, "reward 0.5")
        time.sleep(0.15)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert 3 <= len(lines) <= 5 and not ESCAPES.search(out)
    assert lines[0] == "code 1/4  [compiling]  -:--:-- left" and lines[-1] == "code 2/4  reward 0.5  0:00:01 left"
    time.sleep(0.25)
    assert capsys.readouterr().out == ""


def test_bars_are_for_terminals_alone(monkeypatch: Any):
    assert isinstance(screen(), Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert isinstance(screen(), Lines) and screen().console.color_system is None  # type: ignore
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TTY_INTERACTIVE")
    monkeypatch.setenv("TERM", "xterm")
    assert type(screen()) is Terminal
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screen(), Lines)


def test_a_terminal_has_bars_with_the_time_left():
    code = (
        "import time\nfrom mdrl_jax.report.screen.console import Screen\n"
        "with Screen(None) as s, s.steps('rollback-math-qa: test of controls', 3) as show:\n"
        "    for i in range(3):\n        show(i, 'a [text] that is far too long for eighty columns'); time.sleep(0.3)\n"
    )
    command = f'stty cols 80; exec {sys.executable} -c "{code}"'
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, check=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    frames = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert all(len(frame) <= 80 for frame in frames)
    last = [f for f in frames if "2/3" in f][-1]
    assert re.fullmatch(r"rollback-math-qa: test of controls ━+[╸╺]?━* 2/3 0:00:0\d 0:00:00 left a \[te.*…", last)


def test_plain_text_of_tables_has_no_lines_and_no_markup():
    table = Table(title="transfer")
    table.add_column("a")
    table.add_row("[green]supported[/green]")
    assert plain("[bold]x[/bold]", table).split() == ["x", "transfer", "a", "supported"]
    assert plain("y" * 500) == "y" * 500


# --- texts of others --------------------------------------------------------------------------------------------------

# Colour, title of the window, link (OSC 8), 8-bit CSI, carriage return, bell, delete, backwards writing, half a pair.
COMMANDS = ("\x1b[31m", "\x1b]0;t\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m", "\r", "\x08", "\x7f", "\u202e", "\u2066",
            "\ud800")  # fmt: skip
MARKUP = ("[/bold]", "[bold]", "[link=http://x]", "[/]", "[red]x", "\\[")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_to_the_terminal_become_text(command: str):
    text = printable(f"a{command}b")
    assert text.isprintable() and text.startswith("a\\") and text.endswith("b") and len(text) > len(command) + 2


def test_ordinary_text_is_shown_as_it_is():
    for text in ("a\tb\nc", "ü ✓ 数学 🙂", "\U0001f468\u200d\U0001f469", "می\u200cخواهم", "[bold]"):
        assert printable(text) == text


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("text", [*COMMANDS, *MARKUP])
def test_text_of_data_is_shown_as_text_everywhere(
    output: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    row = f"row {text} end"
    claim = CLAIM | {"id": row, "claim": row, "published": row, "reason": row}
    record = {"stage": row, "index": 0, "seed": 0, "rewards": {row: [[0.5, 1.0], [0.0, 0.25]]}}
    with Screen(tmp_path / "log.txt", output) as seen:
        seen.print(row, final=True)
        seen.warn(row)
        seen.print(terminal.summary(build([record])), final=True)
        seen.print(analysis.verdicts([claim]), analysis.verdict_table([claim]), final=True)
        seen.print(terminal.places(tmp_path / row, 1.0), final=True)
        with seen.steps(row, 2) as show:
            show(1, row)
    whole = printable(row)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    if output == "json":
        assert shown.isascii() and not re.search(r"[^\n -~]", shown)
        events = [json.loads(line) for line in shown.splitlines()]
        shown = "\n".join(event["text"] for event in events if event["event"] == "message")
    for found in (shown, (tmp_path / "log.txt").read_text()):
        assert whole in found and "warning: " + whole in found
        assert not ESCAPES.search(found) and all(c == "\n" or c.isprintable() for c in found)


# --- the final screen -------------------------------------------------------------------------------------------------

CLAIM = {
    "id": "C5", "claim": "damage is mainly second-order", "verdict": "contradicted", "estimate": -0.00929,
    "ci95": [-0.00772, 0.0112], "null": {"mean": 3.26e-07, "low": -1.25e-05, "high": 4.5e-05},
    "published": "long " * 40, "reason": "long " * 200,
}  # fmt: skip


def rendered(*renderables: Any) -> list[str]:
    """Lines at the width of the final screen."""
    console = Console(file=io.StringIO(), width=WIDTH)
    with console.capture() as captured:
        console.print(*renderables, highlight=False, crop=False)
    return captured.get().splitlines()


def test_each_claim_has_one_line_that_fits():
    claims = [CLAIM, CLAIM | {"id": "C3", "verdict": "undecided", "estimate": None, "ci95": None, "null": None}]
    lines = rendered(analysis.verdict_table(claims))
    (one,) = (line for line in lines if "C5" in line)
    assert one.split() == "C5 contradicted -0.00929 [-0.00772, 0.0112] 3.26e-07 [-1.25e-05, 4.5e-05]".split()
    (other,) = (line for line in lines if "C3" in line)
    assert other.split() == "C3 undecided – – –".split()
    assert max(map(len, lines)) <= 100


def test_the_final_screen_fits_and_says_where_things_are(tmp_path: Path):
    record = {"seed": 0, "rewards": {d: [[0.5, 1.0], [0.0, 0.25]] for d in ("code", "math", "qa", "cw")}}
    record["accuracy"] = {d: [[1.0, 1.0], [0.0, 1.0]] for d in record["rewards"]}
    names = ("base", "code", "math", "refresh-math", "rollback-math-qa")
    matrix = build([record | {"stage": name, "index": i} for i, name in enumerate(names)])
    assert max(map(len, rendered(terminal.summary(matrix)))) <= 100
    root = tmp_path / ("very" * 30 + " long")
    assert rendered(terminal.places(root, 61.4)) == ["done in 61 s", f"  work folder  {root}"]
    (root / "report").mkdir(parents=True)
    (root / "report" / "index.html").touch()
    (root / "tensorboard").mkdir()
    assert rendered(terminal.places(root, 61.4)) == [
        "done in 61 s",
        f"  page         {root}/report/index.html",
        f"  work folder  {root}",
        f"  TensorBoard  tensorboard --logdir '{root}/tensorboard'",
    ]


# --- the flag ---------------------------------------------------------------------------------------------------------


def test_the_flag_names_the_modes_and_refuses_others(capsys: pytest.CaptureFixture[str]):
    assert tuple(OUTPUTS) == main_module.OUTPUTS
    assert [type(made()) for made in OUTPUTS.values()] == [Lines, Quiet, JsonLines]
    for command in ("run", "analyze", "rollback", "evaluate"):
        assert main_module.main(["mdrl", command, "--output=loud"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and all(mode in err for mode in OUTPUTS)
        assert main_module.main(["mdrl", command, "--helpshort"]) == 0
        assert "--output: <screen|quiet|json>" in capsys.readouterr().out

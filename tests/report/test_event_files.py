"""Event files read back by TensorBoard's own reader."""

import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mdrl_jax.report.figures import training
from mdrl_jax.report.folder import Absent, Records
from mdrl_jax.report.tensorboard import TensorBoard, save_figures
from tests.report.figures.rendered import check


def read(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in read(folder).Scalars(tag)]


def test_scalars_come_back(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        for step in (1, 2, 10):
            board.scalars(step, {"loss": 0.5 * step, "reward": float(step)})
    assert points(tmp_path, "loss") == [(1, 0.5), (2, 1.0), (10, 5.0)]
    assert points(tmp_path, "reward") == [(1, 1.0), (2, 2.0), (10, 10.0)]


def test_the_report_reads_the_curves_that_tensorboard_shows(tmp_path: Path) -> None:
    stage = tmp_path / "tensorboard" / "01-math"
    for first, size in ((1, 1.0), (3, 10.0), (2, 100.0)):  # twice resumed, the second time from an earlier step
        with TensorBoard(stage, resumed_at=first if size > 1 else None) as board:
            for step in range(first, 5):
                board.scalars(step, {"train/reward": size * step, "train/loss": 0.0})
    (tmp_path / "tensorboard" / "scores").mkdir()
    found = Records(tmp_path).curves(("train/reward", "train/kl"))
    assert found == {"01-math": {"train/reward": {1: 1.0, 2: 200.0, 3: 300.0, 4: 400.0}}}
    assert list(found["01-math"]["train/reward"].items()) == points(stage, "train/reward")
    newest = max(stage.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-9])  # the process was killed while it wrote
    assert Records(tmp_path).curves(("train/reward",))["01-math"]["train/reward"][3] == 300.0
    with pytest.raises(Absent, match="training stage"):
        Records(tmp_path / "none").curves(("train/reward",))


def test_a_long_curve_is_drawn_by_means(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "tensorboard" / "01-math@slow") as board:
        for step in range(1, 251):
            board.scalars(step, {"train/reward": step / 1000, "train/length": 3.0})
    reward, length = training.curves(Records(tmp_path))
    check(reward), check(length)
    assert [r["step"] for r in reward.rows][:2] == [3, 6] and reward.rows[-1]["step"] == 250
    assert reward.rows[0] == {"stage": "math@slow", "step": 3, "value": pytest.approx(0.2)}
    assert "mean of up to 3 steps" in reward.caption and length.rows[0]["value"] == 3.0


def test_flush_is_enough(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.scalars(3, {"loss": 2.0})
    board.flush()
    assert points(tmp_path, "loss") == [(3, 2.0)]
    board.close()


def test_text_image_and_hparams_come_back(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (7, 5), "red").save(buffer, format="PNG")
    with TensorBoard(tmp_path) as board:
        board.text("samples/math", "> 2 ; **4** ü", 4)
        board.image("scores", buffer.getvalue(), 4)
        board.hparams({"learning_rate": 1e-6, "order": "code,math", "kl": True})
        with pytest.raises(ValueError, match="PNG"):
            board.image("scores", b"GIF89a", 4)
        for n in (8, 16, 23):
            with pytest.raises(ValueError, match=f"these {n} bytes end within its header"):
                board.image("scores", buffer.getvalue()[:n], 4)
    found = read(tmp_path)
    (text,) = found.Tensors("samples/math")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (4, "> 2 ; **4** ü")
    (image,) = found.Images("scores")
    assert (image.width, image.height, image.encoded_image_string) == (7, 5, buffer.getvalue())
    assert found.PluginTagToContent("hparams").keys() == {"_hparams_/session_start_info"}


@pytest.mark.parametrize(
    "completion",
    ["![a](http://x/p.png)", "![a][b]\n\n[b]: http://x/p.png", "<img src=http://x/p.png>", "<a href=http://x>y</a>",
     "[y](javascript:alert(1))", r"\![a](http://x/p.png)", "<http://x>", '<iframe src="http://x">', "<svg/onload=x>"],
)  # fmt: skip
def test_a_text_fetches_nothing_when_it_is_shown(completion: str, tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        board.text("samples/math", f"2 + 2 = **{completion}** (1)\n\n{completion}", 1)
    (text,) = read(tmp_path).Tensors("samples/math")
    html = str(markdown_to_safe_html(text.tensor_proto.string_val[0]))
    assert "<p>" in html and not re.search(r"<(?!/?(?:p|strong|em)>)", html)


def hparams(folder: Path) -> dict[str, bool | float | str]:
    """The settings of the run in a folder."""
    content = read(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_settings_of_any_kind_come_back(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        board.hparams(
            {"rate": 1e-6, "steps": 22, "remat": False, "path": "tiny", "stages": ["code", "qa"], "start": None}
        )
    assert hparams(tmp_path) == {
        "rate": 1e-6,
        "steps": 22.0,
        "remat": False,
        "path": "tiny",
        "stages": '["code", "qa"]',
        "start": "null",
    }


def png(colour: str) -> bytes:
    """A small picture."""
    buffer = BytesIO()
    Image.new("RGB", (7, 5), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_figures_of_the_report_are_shown_and_replaced(tmp_path: Path) -> None:
    save_figures(tmp_path)
    (tmp_path / "report").mkdir()
    save_figures(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    for colour in ("red", "blue"):
        for name in ("scores", "rollback-math-qa"):
            (tmp_path / "report" / f"{name}.png").write_bytes(png(colour))
        (tmp_path / "report" / "index.html").write_text("no picture")
        save_figures(tmp_path)
        found = read(tmp_path / "tensorboard" / "figures")
        assert found.Tags()["images"] == ["figures/rollback-math-qa", "figures/scores"]
        for tag in found.Tags()["images"]:
            assert [(e.step, e.encoded_image_string) for e in found.Images(tag)] == [(0, png(colour))]


def test_histogram_comes_back_with_its_counts(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 4))
    with TensorBoard(tmp_path) as board:
        board.histogram("reward", np.append(values, np.nan), 2, bins=10)
        board.histogram("nothing", [np.nan], 2)
    found = read(tmp_path)
    (h,) = found.Histograms("reward")
    h = h.histogram_value
    counts, edges = np.histogram(values, bins=10)
    assert list(h.bucket) == [0, *counts] and list(h.bucket_limit) == pytest.approx(list(edges))
    assert (h.num, h.sum) == (200, pytest.approx(values.sum()))
    assert h.sum_squares == pytest.approx((values**2).sum())
    assert (h.min, h.max) == (values.min(), values.max())
    assert found.Tags()["histograms"] == ["reward"]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        for step in (1, 2, 3):
            board.scalars(step, {"loss": float(step)})
    with TensorBoard(tmp_path, resumed_at=2) as board:
        for step in (2, 3, 4):
            board.scalars(step, {"loss": 10.0 * step})
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_two_writers_without_a_mark_show_both(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with TensorBoard(tmp_path) as board:
            board.scalars(5, {"loss": value})
    assert sorted(points(tmp_path, "loss")) == [(5, 1.0), (5, 2.0)]


def test_tensorflow_is_not_needed(tmp_path: Path) -> None:
    # A None entry makes every import of tensorflow fail, installed or not.
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from mdrl_jax.report.tensorboard import TensorBoard\n"
        f"with TensorBoard({str(tmp_path)!r}) as b:\n"
        "    b.scalars(1, {'a': 1.0}); b.text('t', 'x', 1); b.hparams({'b': 2.0})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert points(tmp_path, "a") == [(1, 1.0)]

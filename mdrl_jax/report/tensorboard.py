"""Writes TensorBoard event files without TensorFlow, and reads their curves for the report.

A resumed run opens a further event file in the same folder and removes nothing from disk. Pass `resumed_at`, the first
step that is written again. TensorBoard then hides the earlier copies of that step and of all later steps; without it,
it shows both copies. The mark hides every tag of the folder from that step on. So if it is used, tags that count
different things (training steps, stages) belong in different folders.
"""

import json
import struct
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
    HistogramProto,  # pyright: ignore[reportAttributeAccessIssue]
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mdrl_jax.parallel import distributed
from mdrl_jax.records import regular

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_figures(workdir: Path) -> None:
    """Writes every `report/NAME.png` of a work folder as the image `figures/NAME` at step 0.

    TensorBoard then shows these images only, and no earlier ones of the folder. The event file is a new one in
    `tensorboard/figures` of the work folder. Without such a PNG nothing is written. If several processes run the
    program, only the first one writes.

    Raises:
      ValueError: if one of the files is not a PNG file, or ends within its header.
      UserError: if one of them is no regular file.
    """
    pictures = sorted((workdir / "report").glob("*.png"))
    if not pictures:
        return
    with TensorBoard(workdir / "tensorboard" / "figures", resumed_at=0) as board:
        for picture in pictures:
            board.image(f"figures/{picture.stem}", regular(picture).read_bytes(), 0)


def scalars(folder: Path, tags: Collection[str]) -> dict[str, dict[int, float]]:
    """The curves in the event files of a folder, as TensorBoard shows them.

    A resumed run marks the first step that it writes again; points from there on that an earlier file has are dropped.
    What follows a torn entry of a file is not read.

    Args:
      folder: the folder of one stage.
      tags: names of the curves to read.

    Returns:
      By tag and step, the value in float32; a tag without points is absent. Empty without event files.

    Raises:
      UserError: if an event file is no regular file.
    """
    # Imported here, because a run only writes.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("*tfevents*"), key=_age):
        for event in LegacyEventFileLoader(str(regular(file))).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                for points in found.values():
                    for step in [step for step in points if step >= event.step]:
                        del points[step]
            for value in event.summary.value:
                if value.tag in tags and value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: dict(sorted(points.items())) for tag, points in found.items() if points}


def _age(file: Path) -> list[int | str]:
    """The parts of an event file's name: its seconds, host, process and number in the process, in this order."""
    return [int(part) if part.isdigit() else part for part in file.name.split(".")]


class TensorBoard:
    """Writes one event file in `folder`; use as a context manager, or call `close`.

    A background thread writes the file at least every ten seconds; `flush` waits for it. If several processes run the
    same program, only the first one writes; in the others every method does nothing.

    Args:
      folder: where the event file goes; it is made if needed.
      resumed_at: the first step that is written again after an interruption, or None.
    """

    def __init__(self, folder: str | Path, resumed_at: int | None = None):
        self._writer = EventFileWriter(str(folder), flush_secs=10) if distributed.is_first() else None
        if resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(session_log=start), resumed_at)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to several curves; TensorBoard stores it in float32.

        Args:
          step: the step that the points belong to.
          values: the value of each curve, by the curve's tag.
        """
        points = [Summary.Value(tag=t, simple_value=float(v)) for t, v in values.items()]
        self._add(Event(summary=Summary(value=points)), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Adds a text, which TensorBoard shows as Markdown without links, images and HTML.

        Prompts and completions are part of such texts. An image in them would be fetched from its server whenever the
        text is looked at, so the characters that begin links, images and tags become the entities of HTML.

        Args:
          tag: its name in TensorBoard.
          text: the Markdown.
          step: the step that it belongs to.
        """
        self._add(Event(summary=text_pb(tag, text.replace("[", "&#91;").replace("<", "&lt;"))), step)

    def histogram(self, tag: str, values: ArrayLike, step: int, bins: int = 30) -> None:
        """Adds the distribution of the finite entries of `values`; nothing if there are none.

        Args:
          tag: its name in TensorBoard.
          values: numbers of any shape.
          step: the step that it belongs to.
          bins: number of bins of equal width, at least 1.
        """
        x = np.asarray(values, float).ravel()
        x = x[np.isfinite(x)]
        if x.size == 0:
            return
        counts, edges = np.histogram(x, bins=bins)
        histogram = HistogramProto(min=x.min(), max=x.max(), num=x.size, sum=x.sum(), sum_squares=np.sum(x * x))
        # A bucket is named by its right edge; the first, empty one gives the left end.
        histogram.bucket_limit.extend(edges.tolist())
        histogram.bucket.extend([0.0, *counts.tolist()])
        self._add(Event(summary=Summary(value=[Summary.Value(tag=tag, histo=histogram)])), step)

    def image(self, tag: str, png: bytes, step: int) -> None:
        """Adds a picture.

        Args:
          tag: its name in TensorBoard.
          png: the bytes of a PNG file.
          step: the step that it belongs to.

        Raises:
          ValueError: if `png` is not a PNG file, or ends within its header.
        """
        if not png.startswith(PNG_SIGNATURE):
            raise ValueError("png must be the bytes of a PNG file; these bytes lack the PNG signature")
        if len(png) < 24:
            raise ValueError(f"png must be the bytes of a PNG file; these {len(png)} bytes end within its header")
        width, height = struct.unpack(">II", png[16:24])
        picture = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._add(Event(summary=Summary(value=[Summary.Value(tag=tag, image=picture)])), step)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Adds the settings of the run, at step 0, to TensorBoard's table of runs.

        Args:
          values: the settings by name. A value that is no string, number or bool is written as JSON.

        Raises:
          TypeError: if a value cannot be written as JSON.
        """
        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}
        self._add(Event(summary=hparams_pb(plain)), 0)

    def flush(self) -> None:
        """Waits until everything added so far is in the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, event: Event, step: int) -> None:
        if self._writer is None:
            return
        event.step = int(step)
        event.wall_time = time.time()
        self._writer.add_event(event)

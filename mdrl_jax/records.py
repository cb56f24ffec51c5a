"""Files of the work folder: each is written whole or not at all (temporary name, fsync, rename).

Where several processes run the same program, all call the functions that write, process 0 writes, and none goes on
before the file is there: what any of them read before in the program it read before the file was changed.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` atomically, creating its folder."""
    path = Path(path)
    distributed.barrier(f"before {path.name}")
    if distributed.is_first():
        _write(path, data)
    distributed.barrier(f"after {path.name}")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """One JSON document, indented, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, the whole file atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: str | Path) -> Any:
    """The JSON document at `path`. Raises UserError if it is absent or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); remove it to have it written again") from e


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if it is absent. Raises UserError on a damaged line."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path} line {number} is not valid JSON ({e})") from e
    return rows

"""TPU chips as published, and slices of them that programs are compiled for without one being at hand.

Peaks and bandwidths are those of cloud.google.com/tpu/docs. Memory is given twice: as published, and what the compiler
leaves to a program of it (it names this figure where it refuses one).
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, one JAX device.

    Attributes:
      published_gib: its memory.
      gib: what of it a program may take.
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second to and from its memory.
    """

    name: str
    published_gib: float
    gib: float
    flops: float
    bandwidth: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32, 30.75, 275e12, 1228e9),
        Chip("v5e", 16, 15.75, 197e12, 819e9),
        Chip("v5p", 95, 95.74, 459e12, 2765e9),  # 95 as published is 95.74 GiB to the compiler
        Chip("v6e", 32, 31.25, 918e12, 1640e9),
    )
}
# Of chips with two cores: both as one device, as JAX runs them.
OPTIONS: Mapping[str, Mapping[str, str]] = {name: {"chip_config_name": "megacore"} for name in ("v4", "v5p")}
TOPOLOGY = re.compile(r"(\w+):\d+x\d+(x\d+)?")
INSTALL = "the TPU compiler is not installed; on any Linux machine: pip install '.[tpu]'"


def compiler_alone() -> None:
    """Sets what libtpu's compiler needs where there is no TPU, and keeps JAX off one that is there.

    Before JAX is imported.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes may compile; one alone may run


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as v5e:4x4.

    Raises:
      UserError: if it is none of `CHIPS`, or no slice.
    """
    matched = TOPOLOGY.fullmatch(topology)
    if matched is None or matched[1] not in CHIPS:
        raise UserError(
            f"--topology={topology} is not known; it is a chip ({', '.join(CHIPS)}) and the sides of a slice of them, "
            "e.g. v5e:4x4 or v5p:2x2x2"
        )
    return CHIPS[matched[1]]


def devices(topology: str) -> list[Any]:
    """The devices of a slice, to make a mesh of and compile for.

    Raises:
      UserError: if the compiler is not installed, or there is no such slice.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(INSTALL)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **OPTIONS.get(chip.name, {})
        ).devices
    except Exception as e:  # of several kinds, with stack traces of libtpu
        reason = str(e).split(": ", 1)[-1].strip().splitlines()[0]
        raise UserError(f"--topology={topology} is no slice that the compiler knows: {reason}") from e
    return list(found)

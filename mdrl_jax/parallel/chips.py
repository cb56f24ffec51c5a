"""Published figures of TPU chips, and devices of TPU slices for which programs can be compiled without a TPU.

Peaks and bandwidths come from cloud.google.com/tpu/docs. Memory is given twice: the published size, and the size that a
program may take. The compiler states the second when it refuses a program that is too large.
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
    """A TPU chip, which is one JAX device.

    Attributes:
      name: the chip in the name of a slice, e.g. v5e in v5e:4x4.
      published_gib: published size of its memory, in GiB.
      gib: memory that a program may take, in GiB.
      flops: peak of dense bfloat16 operations per second.
      bandwidth: bytes per second to and from its memory.
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
        Chip("v5p", 95, 95.74, 459e12, 2765e9),  # published as 95; the compiler states 95.74 GiB
        Chip("v6e", 32, 31.25, 918e12, 1640e9),
    )
}
# These chips have two cores. "megacore" makes both one device, as JAX runs them.
OPTIONS: Mapping[str, Mapping[str, str]] = {name: {"chip_config_name": "megacore"} for name in ("v4", "v5p")}
TOPOLOGY = re.compile(r"(\w+):\d+x\d+(x\d+)?")
INSTALL = "the TPU compiler is not installed; on any Linux machine: pip install 'jax[tpu]'"


def compiler_alone() -> None:
    """Sets the environment so that libtpu compiles without a TPU, and so that JAX does not take a TPU that is present.

    It overwrites `JAX_PLATFORMS`, `TPU_SKIP_MDS_QUERY` and `ALLOW_MULTIPLE_LIBTPU_LOAD` in `os.environ`. It has to be
    called before JAX is imported. `TPU_WORKER_HOSTNAMES` and `TPU_ACCELERATOR_TYPE` are set if they are not: they do
    not change the slices that can be compiled for, but without them libtpu prints errors about the absent TPU.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock protects a TPU; only compiling needs no lock
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


def chip_of(topology: str) -> Chip:
    """The chip of a slice.

    Args:
      topology: a chip and the two or three sides of a slice of them, such as v5e:4x4 or v5p:2x2x2. The numbers of the
        sides are not checked.

    Raises:
      UserError: if the text does not have this form, or its chip is not in `CHIPS`.
    """
    matched = TOPOLOGY.fullmatch(topology)
    if matched is None or matched[1] not in CHIPS:
        raise UserError(
            f"--topology={topology} is not known; give a chip ({', '.join(CHIPS)}) and the sides of a slice of them, "
            "e.g. v5e:4x4 or v5p:2x2x2"
        )
    return CHIPS[matched[1]]


def devices(topology: str) -> list[Any]:
    """The devices of a slice: a mesh can be made of them and programs compiled for it, but nothing runs on them.

    On a machine without a TPU, `compiler_alone` has to be called before.

    Args:
      topology: a chip and the two or three sides of a slice of them, such as v5e:4x4 or v5p:2x2x2.

    Returns:
      one device for each chip, in the compiler's order.

    Raises:
      UserError: if the text does not have this form, its chip is not in `CHIPS`, the compiler is not installed, or the
        compiler does not know the slice.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(INSTALL)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **OPTIONS.get(chip.name, {})
        ).devices
    except Exception as e:  # libtpu raises several types, with its own stack trace in the message
        reason = (str(e).split(": ", 1)[-1].strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--topology={topology} is not a slice that the compiler knows: {reason}") from e
    return list(found)

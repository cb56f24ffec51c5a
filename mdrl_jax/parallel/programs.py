"""Makes the device programs of the package and counts how often each is compiled.

A recompilation inside a loop, caused by a new shape or a new static value, is the most common way to lose time on a TPU
without noticing. Therefore the jitted functions of the package are made here (except the two that initialise parameters
and optimizer state once), and the line that ends a training stage shows the total of `compilations`.
"""

import functools
import hashlib
import os
import platform
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mdrl_jax.errors import UserError

compilations: Counter[str] = Counter()
CACHE_BYTES = 2**31  # of the folder of compiled programs; the entries that were read last stay


def keep_compiled(folder: str | None = None) -> str:
    """Keeps compiled programs in a folder, where later processes find them instead of compiling them again.

    It changes JAX's configuration of this process and is called once: after the first program was kept, JAX goes on to
    use its folder, and "off" is not taken back. Several processes may share the folder, because JAX locks it. It holds
    at most `CACHE_BYTES`. Programs that compile in less than 0.1 seconds are not kept.

    Args:
      folder: the folder, which is made if it does not exist; "": `default_cache`; "off": nothing is kept or read.
        None: the folder that JAX is set to, such as by the environment variable JAX_COMPILATION_CACHE_DIR, with JAX's
        own limits of size and time; if there is none, `default_cache`.

    Returns:
      Why nothing is kept, if `default_cache` was to be used and cannot be written; otherwise "".

    Raises:
      UserError: if a folder is given that cannot be written.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder is not None or jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        place = folder or str(default_cache())
        if "://" not in place and not _writable(Path(place)):  # JAX itself writes to buckets
            if folder:
                raise UserError(f"--compilation_cache={folder} cannot be written; name another folder, or off")
            jax.config.update("jax_enable_compilation_cache", False)
            homeless = Path(os.devnull) in Path(place).parents
            return "this user has no home folder" if homeless else f"{place} cannot be written"
        jax.config.update("jax_compilation_cache_dir", place)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        # Another process holds the folder: the program is compiled again some day, which concerns no user.
        warnings.filterwarnings("ignore", r"Error writing persistent compilation cache .* could not be acquired")
    return ""


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)


def user_cache() -> Path:
    """The user's folder of what the package can make again: `mdrl_jax` in $XDG_CACHE_HOME, or else in ~/.cache.

    It is not made here. An empty XDG_CACHE_HOME counts as not set. For a user without a home folder, as in some
    containers, the result is a path at which nothing can be made.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdrl_jax"
    except RuntimeError:
        return Path(os.devnull, "mdrl_jax")


def default_cache() -> Path:
    """The user's folder of compiled programs: `compiled-MACHINE-HASH` in `user_cache`; it is not made here.

    MACHINE is the architecture, such as x86_64. HASH is 8 hexadecimal digits of the SHA-256 of the processor's list of
    instructions in /proc/cpuinfo, or of its name where that file does not exist. Each kind of processor has its own
    folder, because programs for one kind may not run on another and hosts may share a home folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        instructions = platform.processor()
    kind = hashlib.sha256(instructions.encode()).hexdigest()[:8]
    return user_cache() / f"compiled-{platform.machine()}-{kind}"


def program(name: str, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **jit_options)`, with a counter of its traces.

    Args:
      name: the key in `compilations`; functions of one name are counted together.
      function: a function of JAX arrays.
      **jit_options: options of `jax.jit`.

    Returns:
      the jitted function. Each trace adds 1 to `compilations[name]`: the first call, and each call with a new tree
      structure, new shapes, dtypes or static values, or in another mesh. A trace by `lower` or within another jitted
      function counts, too. If JAX compiles without a new trace, as for another sharding on the same mesh, nothing is
      added.

    Raises:
      TypeError: if `jax.jit` has no such option.
      ValueError: if an option does not fit the function, such as a static argument that it does not have.
    """

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        compilations[name] += 1
        return function(*args, **kwargs)

    counted.__name__ = counted.__qualname__ = name.replace(" ", "_")  # what profiles and compilation logs show
    return jax.jit(counted, **jit_options)


def peak_bytes() -> int:
    """The most memory that this process has taken so far, in bytes.

    It is that of the fullest local device if the backend counts allocations, as TPUs and GPUs do. Otherwise, as on the
    CPU, it is the largest resident set of the process, with Python, its libraries and data.
    """
    counted = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in counted if stats and "peak_bytes_in_use" in stats]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

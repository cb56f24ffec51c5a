"""Where compiled programs are kept, and the names that they have."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import programs

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def restored() -> Iterator[None]:
    """JAX's settings of the cache, as they were before."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def kept(folder: Path) -> int:
    """Compiles a program anew; the number of programs in the folder."""
    jax.clear_caches()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    programs.program("a product", lambda x: jnp.tanh(x @ x)).lower(jnp.ones((8, 8))).compile()
    return len([f for f in folder.glob("*-cache") if "a_product" in f.name]) if folder.exists() else 0


def test_programs_are_kept_where_the_flag_says(restored: None, tmp_path: Path):
    programs.keep_compiled(str(tmp_path / "here"))
    assert kept(tmp_path / "here") == 1
    assert kept(tmp_path / "here") == 1
    assert 0 < jax.config.jax_compilation_cache_max_size == programs.CACHE_BYTES  # so that JAX locks the folder


def test_programs_are_kept_for_the_user_unless_jax_has_a_folder(
    restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    programs.keep_compiled()
    assert kept(tmp_path / "given") == 1 and not programs.default_cache().exists()
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    programs.keep_compiled()
    assert programs.default_cache().is_relative_to(tmp_path) and kept(programs.default_cache()) == 1


def test_off_keeps_nothing(restored: None, tmp_path: Path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    programs.keep_compiled("off")
    assert kept(tmp_path) == 0


def test_a_folder_that_cannot_be_written_is_named(restored: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert programs.keep_compiled() == f"{programs.default_cache()} cannot be written"
    assert jax.config.jax_compilation_cache_dir is None and kept(tmp_path) == 0
    with pytest.raises(UserError, match="--compilation_cache=.*cannot be written"):
        programs.keep_compiled(str(tmp_path / "file" / "below"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path(f"~{os.urandom(8).hex()}").expanduser())  # no such user
    assert programs.keep_compiled() == "this user has no home folder"

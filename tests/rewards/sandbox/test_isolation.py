"""Which isolation is chosen, what is refused, and which files and packages a sandbox sees."""

import compileall
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.rewards.sandbox import isolation, run, server

NO_FILES = isolation.Isolation("bare", ("files", "disk"), "bwrap is not installed")
FILES = isolation.Isolation("bare", ("disk",), "bwrap is not installed")


def test_programs_are_refused_where_files_are_not_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "probe", lambda: NO_FILES)
    with pytest.raises(UserError, match=r"no Landlock.*install bubblewrap.*rewards\.sandbox='none'"):
        isolation.choose("best")
    with pytest.raises(UserError, match="rewards.sandbox='bwrap', but bwrap is not installed"):
        isolation.choose("bwrap")
    assert isolation.choose("none") == NO_FILES
    monkeypatch.setattr(isolation, "probe", lambda: FILES)
    assert isolation.choose("best") == isolation.choose("none") == FILES


def test_packages_without_bytecode_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the files of the distributions, whose names are not those of their modules; what they require counts, too."""
    for name, required in (("slow-one", ""), ("quick.one", "Requires-Dist: single\n"), ("single", "")):
        module = name.replace("-", "_").replace(".", "_")
        source = f"{module}.py" if name == "single" else f"{module}/__init__.py"
        (tmp_path / source).parent.mkdir(exist_ok=True)
        (tmp_path / source).write_text("")
        info = tmp_path / f"{module}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{required}")
        (info / "RECORD").write_text(f"{source},,\n{info.name}/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    isolation.package_paths.cache_clear()
    assert compileall.compile_dir(tmp_path / "quick_one", quiet=2)
    isolation.warn_of_slow_imports(["slow-one", "quick.one", "no.such.package"])
    told = caplog.text
    assert "no compiled bytecode of single, slow_one, so" in told and told.count("\n") == 1
    assert f"{sys.executable} -m compileall -q {tmp_path / 'single.py'} {tmp_path / 'slow_one'}" in told
    assert compileall.compile_dir(tmp_path, quiet=2)
    caplog.clear()
    isolation.warn_of_slow_imports(["slow-one", "quick.one"])
    assert not caplog.text


def test_a_package_below_tmp_does_not_cost_a_new_sandbox_after_every_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a virtual environment in /tmp. What is mounted there cannot be removed, so only the working folder is."""
    if isolation.probe().kind != "bwrap":
        pytest.skip("bwrap does not run here")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        info = Path(folder, "below_tmp-1.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: below-tmp\nVersion: 1\n")
        (info / "RECORD").write_text(f"below_tmp.py,,\n{info.name}/METADATA,,\n")
        Path(folder, "below_tmp.py").write_text("")
        monkeypatch.syspath_prepend(folder)
        isolation.package_paths.cache_clear()
        settings = run.Settings(packages=("below-tmp",))
        assert isolation.package_paths(settings.packages)
        run.close()
        try:
            seen = []
            for _ in range(3):
                left = "import os\nleft = os.listdir('.')\nopen('left', 'w').close()"
                assert run.run(left, ["assert left == []"], settings=settings) == "ok"
                seen.append({holds: sandbox.process.pid for holds, sandbox in run._sandboxes.items()})
            assert seen == [seen[0]] * 3
        finally:
            run.close()
            isolation.package_paths.cache_clear()


def test_off_linux_programs_run_only_if_the_user_allows_it() -> None:
    code = (
        "import os, sys\n"
        "from mdrl_jax.rewards.sandbox import isolation, run as sandbox\n"
        "isolation.sysconfig.get_paths()\n"  # kept, since no Python here was built for another system
        "other = \"import os, sys; sys.platform = 'darwin'; del os.setresuid; \"\n"
        "isolation._START = other + isolation._START\n"
        "exec(other)\n"
        "os.environ['PATH'] = ''\n"
        "try: isolation.choose('best')\n"
        "except isolation.UserError as e: print(e)\n"
        "settings = sandbox.Settings(sandbox='none')\n"
        "for test in ('assert x == 1', 'assert x == 2'):\n"
        "    print(sandbox.run('x = 1', [test], settings=settings))\n"
        "sandbox.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, *outcomes = done.stdout.splitlines()
    assert refused.startswith("bwrap needs Linux") and "use a Linux container or virtual machine" in refused
    assert outcomes == ["ok", "failed"] and done.stderr == ""


def test_a_closed_folder_is_removed_where_there_is_no_o_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed/below").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    chmod, opened = os.chmod, []

    def record(name: str, mode: int, *, dir_fd: int, follow_symlinks: bool) -> None:
        opened.append((name, mode, follow_symlinks))
        chmod(name, mode, dir_fd=dir_fd)  # the C library of Linux may not know `follow_symlinks`

    monkeypatch.delattr(os, "O_PATH", raising=False)
    monkeypatch.setattr(os, "chmod", record)
    assert server.remove_contents(str(tmp_path), 30.0) and os.listdir(tmp_path) == []
    assert opened == [("closed", 0o700, False)]


def test_a_listed_package_brings_what_it_requires_and_nothing_else() -> None:
    names = {Path(p).name for p in isolation.package_paths(("pandas",))}
    assert {"pandas", "numpy", "dateutil"} <= names
    assert not {"jax", "mdrl_jax", "pytest", "transformers"} & names
    assert isolation.package_paths(()) == isolation.package_paths(("no-such-distribution",)) == ()


def test_neither_installed_packages_nor_the_users_folders_are_readable(tmp_path: Path) -> None:
    readable, listed = isolation._readable(())
    site = [os.path.realpath(p) for p in sys.path if p.endswith("site-packages")]
    assert site
    for path in [*site, str(Path.home()), str(Path.home() / ".local"), str(Path(__file__)), str(tmp_path), "/etc", "/"]:
        real = os.path.realpath(path)
        assert not any(isolation._below(real, os.path.realpath(r)) for r in readable), path
    assert all(os.path.isdir(p) for p in listed)


def test_an_interpreter_in_the_users_folder_opens_no_more_than_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ".local"
    (home / "lib/python3.11/site-packages/secret").mkdir(parents=True)
    (home / "lib/python3.11/os.py").touch()
    (home / "share").mkdir()
    (home / "bin").mkdir()
    python = home / "bin/python3"
    python.touch()
    paths = {"stdlib": str(home / "lib/python3.11"), "platstdlib": str(home / "lib/python3.11")}
    paths |= {
        "purelib": str(home / "lib/python3.11/site-packages"),
        "platlib": str(home / "lib/python3.11/site-packages"),
    }
    monkeypatch.setattr(isolation.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(isolation.sys, "base_prefix", str(home))
    monkeypatch.setattr(isolation.sys, "executable", str(python))
    for cached in (isolation._python_paths, isolation._readable):
        cached.cache_clear()
    try:
        readable, _ = isolation._readable(())
        own = {p for p in readable if isolation._below(p, str(tmp_path))}
        assert own == {str(python), str(home / "lib/python3.11/os.py")}
    finally:
        for cached in (isolation._python_paths, isolation._readable):
            cached.cache_clear()


def test_everything_that_a_child_leaves_is_removed_and_no_link_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    (outside / "kept").write_text("x")
    outside.chmod(0o500)
    (inside / "link").symlink_to(outside)
    (inside / "closed/below").mkdir(parents=True)
    (inside / "closed/below/file").touch()
    (inside / "closed").chmod(0)
    before = os.getcwd()
    try:
        os.chdir(inside)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(before)
    assert server.remove_contents(str(inside), 30.0) and os.listdir(inside) == []
    assert (outside / "kept").read_text() == "x" and outside.stat().st_mode & 0o777 == 0o500
    assert not server.remove_contents(str(tmp_path / "absent"), 1.0)

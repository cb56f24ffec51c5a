"""Tests of the architecture: imports go in one direction, and some libraries are imported by one file only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mdrl_jax

PACKAGE = Path(mdrl_jax.__file__).parent

# The layers of the package, lowest first: (what it holds, names of its files and folders). A module may import modules
# of its own layer ("floor") and of lower ones. `config` is above `rl`, because each section of the configuration is
# declared beside the code that reads it, and `config` collects the sections. Modules that need a whole `Config` are
# above `config`.
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("plain helpers", ("errors", "progress", "section", "tree")),
    ("meshes, processes, compiled programs", ("parallel",)),
    ("files", ("records", "manifest")),
    ("estimates, intervals, nulls", ("stats",)),
    ("claims: records in, verdicts out", ("claims",)),
    ("the decoder and its file formats", ("model",)),
    ("prompts, and rewards of completions", ("domains", "rewards")),
    ("sampling, losses, the training step", ("rl",)),
    ("what a user sets", ("config",)),
    ("what a stage name means; the work folder", ("stage", "workfolder")),
    ("checkpoints", ("checkpoints",)),
    ("building a run", ("runtime",)),
    ("scores of a set of parameters", ("evaluate",)),
    ("second derivatives of a model", ("second_order",)),
    ("what one domain's training does to another", ("analysis",)),
    ("winning a domain back", ("recovery",)),
    ("records to tables, figures, page, terminal", ("report",)),
    ("what each kind of stage does", ("stages",)),
    ("benchmarks", ("bench",)),
    ("the list of stages, walked; the other commands", ("experiment", "commands")),
    ("flags to commands", ("command_line", "main")),
)
FLOOR = {name: i for i, (_, names) in enumerate(FLOORS) for name in names}
MOST_FILES = 16  # in a folder, `__init__.py` included
LOOP = ("stages", "experiment", "commands", "main")  # modules that run stages


def module_name(file: Path) -> str:
    """The dotted name: `rl.grpo` for mdrl_jax/rl/grpo.py, `rl` for mdrl_jax/rl/__init__.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(file): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imports(tree: ast.AST) -> set[str]:
    """Full names of all imports of a file, also of those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(name: str) -> str | None:
    """The module of this package that has an imported name, or that it names; None if it is from another package."""
    if name.split(".")[0] != "mdrl_jax":
        return None
    inner = name.removeprefix("mdrl_jax").removeprefix(".")
    while inner not in SOURCES:
        inner = inner.rpartition(".")[0]
    return inner


IMPORTED = {name: imports(tree) for name, tree in TREES.items()}
OWN = {name: {inner for n in found if (inner := own(n))} for name, found in IMPORTED.items()}


def within(name: str, *places: str) -> bool:
    """Whether a dotted name is one of `places` or inside one of them."""
    return any(name == place or name.startswith(place + ".") for place in places)


def floor(name: str) -> int:
    """Index of a module's layer in `FLOORS`, from its folder, or from its file if it is in no folder."""
    room = name.partition(".")[0]
    assert room in FLOOR, f"mdrl_jax.{name} is in no layer of tests/test_layers.py; add it to FLOORS"
    return FLOOR[room]


MODULES = [name for name in SOURCES if name]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_no_higher_floor(name: str):
    above = {other for other in OWN[name] if other and floor(other) > floor(name)}
    assert not above, f"{name}, in the layer {FLOORS[floor(name)][0]!r}, imports from higher layers: {above}"


def test_every_row_of_the_table_is_there():
    assert {name.partition(".")[0] for name in MODULES} == set(FLOOR)


def test_a_folder_has_few_files():
    folders = [PACKAGE, *(f for f in PACKAGE.rglob("*") if f.is_dir() and any(f.glob("*.py")))]
    large = {str(f.relative_to(PACKAGE)): n for f in folders if (n := len(list(f.glob("*.py")))) > MOST_FILES}
    assert not large


def test_rooms_without_an_import_cycle():
    """Folders and single files at the top do not import each other in a cycle either."""
    rooms: dict[str, set[str]] = {}
    for name, found in OWN.items():
        room = name.partition(".")[0]
        rooms.setdefault(room, set()).update({o.partition(".")[0] for o in found if o} - {room})
    done: list[str] = []
    while ready := sorted(r for r, needs in rooms.items() if r not in done and needs <= set(done)):
        done += ready
    assert set(done) == set(rooms), f"these import each other in a cycle: {set(rooms) - set(done)}"


def test_there_is_no_circle_of_imports():
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in OWN[name] - {"", name}:
                visit(other, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in SOURCES:
        visit(name, ())


def test_only_the_command_line_imports_the_experiment():
    assert {name for name, found in OWN.items() if "experiment" in found} == {"main"}
    assert not any(found & {"main"} for found in OWN.values())


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "rewards", "domains", "model.hub")])
def test_rewards_and_domains_import_nothing_of_jax(name: str):
    outside = {other for other in IMPORTED[name] if within(other, "jax", "jaxlib", "flax", "optax", "orbax")}
    assert not outside
    inside = ("", "rewards", "domains", "errors", "records", "section", "model.hub")
    assert all(within(other, *inside) for other in OWN[name])


def test_grpo_never_sees_a_model():
    assert not OWN["rl.grpo"] - {"errors", "section"}
    assert not any(within(name, "flax.linen", "optax", "flax.nnx") for name in IMPORTED["rl.grpo"])


def test_analysis_and_recovery_never_see_the_loop():
    for name, found in OWN.items():
        if within(name, "analysis", "recovery"):
            assert not [other for other in found if within(other, *LOOP)], name


def test_only_checkpoints_knows_orbax():
    """The exception is `parallel.distributed`.

    Only Orbax gives public access to the client of JAX's coordination service.
    """
    know = [name for name, found in IMPORTED.items() if any(within(n, "orbax") for n in found)]
    assert know == ["checkpoints", "parallel.distributed"]
    assert {n for n in IMPORTED["parallel.distributed"] if within(n, "orbax")} == {"orbax.checkpoint.multihost"}


def test_only_one_file_names_mesh_axes():
    """All other files name logical axes, which the table in `parallel/sharding.py` maps to mesh axes."""
    for name, tree in TREES.items():
        if name != "parallel.sharding":
            made = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
            assert "PartitionSpec" not in made and "RULES" not in made, name


FORBIDDEN = (
    "ravel_pytree",
    "pmap",
    "pjit",
    "device_put_sharded",
    "device_put_replicated",
    "jax.experimental.shard_map",
    "jax.core",
    "jaxopt",
)


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_uses_what_was_given_up(name: str):
    tree = TREES[name]
    used = set(IMPORTED[name]) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for word in FORBIDDEN:
        hits = [use for use in used if f".{word}." in f".{use}."]
        assert not hits, f"{name} uses {hits}"


def test_rewards_and_domains_start_without_jax():
    """So reward workers start in a fraction of a second and do not occupy a device."""
    wanted = [n for n in SOURCES if within(n, "rewards") and n != "rewards.worker"]
    wanted += ["domains.base", "domains.math", "domains.code", "domains.qa", "domains.cw", "domains.registry"]
    lines = [f"import mdrl_jax.{name}" for name in wanted]
    lines += ["import sys", "print(sorted({'jax', 'jaxlib', 'flax', 'numpy', 'transformers'} & set(sys.modules)))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

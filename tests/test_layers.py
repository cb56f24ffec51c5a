"""Imports go one way, and each outside library stays behind the file that knows it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mdrl_jax

PACKAGE = Path(mdrl_jax.__file__).parent

# A module may import those before it and those beside it. `config` collects the sections that the modules before
# it declare beside the code that reads them, so it comes after these; what reads a whole Config comes after it.
LAYERS = (
    ("errors", "progress", "tokens", "tree"),
    ("parallel",),
    ("records", "manifest", "preemption"),
    ("model",),
    ("domains", "rewards"),
    ("rl.rollout", "rl.logprobs"),
    ("rl.grpo",),
    ("rl.trainer", "rl.sft", "rl.policy"),
    ("config",),
    ("stages", "workfolder"),
    ("checkpoints",),
    ("runtime",),
    ("rl.loop", "rl.pretraining"),
    ("evaluate",),
    ("analysis",),
    ("recovery",),
    ("report",),
    ("bench",),
    ("training",),
    ("planning",),
    ("experiment", "commands"),
    ("main",),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
LOOP = ("rl.loop", "rl.pretraining", "experiment", "commands", "main")


def module_name(file: Path) -> str:
    """`rl.grpo` for mdrl_jax/rl/grpo.py, `rl` for its package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(file): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imports(tree: ast.AST) -> set[str]:
    """Full names of what is imported anywhere in a file, functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(name: str) -> str | None:
    """The module of this package that an imported name is or lies in, None if it is another's."""
    if name.split(".")[0] != "mdrl_jax":
        return None
    inner = name.removeprefix("mdrl_jax").removeprefix(".")
    while inner not in SOURCES:
        inner = inner.rpartition(".")[0]
    return inner


IMPORTED = {name: imports(tree) for name, tree in TREES.items()}
OWN = {name: {inner for n in found if (inner := own(n))} for name, found in IMPORTED.items()}


def within(name: str, *places: str) -> bool:
    """Whether a dotted name is, or lies in, one of the places."""
    return any(name == place or name.startswith(place + ".") for place in places)


def layer(name: str) -> int:
    """Number of a module's layer, by the longest prefix in the table."""
    prefix = name
    while prefix and prefix not in LAYER:
        prefix = prefix.rpartition(".")[0]
    assert prefix, f"mdrl_jax.{name} has no layer in tests/test_layers.py"
    return LAYER[prefix]


MODULES = [name for name in SOURCES if name not in ("", "rl")]  # packages without code of their own


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_no_later_layer(name: str):
    late = {other for other in OWN[name] - {"rl"} if layer(other) > layer(name)}
    assert not late, f"{name} (layer {layer(name)}) imports {late}"


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


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "rewards", "domains")])
def test_rewards_and_domains_import_nothing_of_jax(name: str):
    outside = {other for other in IMPORTED[name] if within(other, "jax", "jaxlib", "flax", "optax", "orbax")}
    assert not outside
    assert all(within(other, "", "rewards", "domains", "errors", "records") for other in OWN[name])


def test_grpo_never_sees_a_model():
    assert not OWN["rl.grpo"] - {"errors"}
    assert not any(within(name, "flax.linen", "optax", "flax.nnx") for name in IMPORTED["rl.grpo"])


def test_analysis_and_recovery_never_see_the_loop():
    for name, found in OWN.items():
        if within(name, "analysis", "recovery"):
            assert not [other for other in found if within(other, *LOOP)], name


def test_only_checkpoints_knows_orbax():
    """Beside it, `parallel.distributed` takes from Orbax the one public name of JAX's coordination service."""
    know = [name for name, found in IMPORTED.items() if any(within(n, "orbax") for n in found)]
    assert know == ["checkpoints", "parallel.distributed"]
    assert {n for n in IMPORTED["parallel.distributed"] if within(n, "orbax")} == {"orbax.checkpoint.multihost"}


def test_only_one_file_names_mesh_axes():
    """Every other file names logical axes (`parallel/sharding.py` has the table)."""
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
    """Reward workers start in a fraction of a second and hold no device."""
    wanted = [n for n in SOURCES if within(n, "rewards") and n != "rewards.worker"]
    wanted += ["domains.base", "domains.math", "domains.code", "domains.qa", "domains.cw", "domains.registry"]
    lines = [f"import mdrl_jax.{name}" for name in wanted]
    lines += ["import sys", "print(sorted({'jax', 'jaxlib', 'flax', 'numpy', 'transformers'} & set(sys.modules)))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Measures other libraries on the problem of `bench/curvature.py`, if they are installed.

- matfree (JAX) provides solvers but no products. The products follow its documentation: `jax.jvp` of `jax.grad`, and
  `jax.jvp` with `jax.vjp`, on one flat vector of parameters. Its Lanczos, with full reorthogonalisation, is compiled
  into one program together with its products. Units are our gradient and our product.
- curvlinops (torch) runs on a `transformers` model with the same weights, eagerly on the CPU. The unit is torch's own
  gradient. torch cannot differentiate the backward pass of its SiLU or of its fused attention in forward mode, so its
  products and its gradient use x·sigmoid(x) and plain attention.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.bench.curvature import IN_GRADIENTS, LANCZOS, ON_ROUTE, Problem, Route, logits
from mdrl_jax.bench.measure import Line, Task, compiled
from mdrl_jax.model import huggingface

TORCH_GRADIENT = "torch gradient"


def installed(*packages: str) -> bool:
    """Whether all these top-level packages can be found; nothing is imported. Without packages it is true."""
    return all(importlib.util.find_spec(package) for package in packages)


def matfree(given: Problem, on: Route) -> tuple[dict[str, Task], list[Line]]:
    """Compiles matfree's Hessian product, its Gauss–Newton product and its Lanczos of 16 steps.

    Args:
      given: the problem on all parameters.
      on: the problem on a route, for Lanczos.

    Returns:
      the tasks with their FLOPs and memory by name, "matfree Hv", "matfree GGN" and "matfree Lanczos"; and the lines of
      the table. The lines divide by the tasks "gradient" of `whole_tasks` and "Hv on the route" of `route_tasks`, which
      the caller has to measure too. If matfree is not installed: no tasks, and a line that says so.
    """
    if not installed("matfree"):
        return {}, [Line("matfree", reason="matfree is not installed")]
    decomp = importlib.import_module("matfree.decomp")
    flat_params, params_of = flatten(given.params)
    flat_v, _ = flatten(given.v)
    micro, outputs = given.micro, logits(given)

    def mean(sum_and_count: tuple[jax.Array, jax.Array]) -> jax.Array:
        return sum_and_count[0] / sum_and_count[1]

    def hv(flat: jax.Array, v: jax.Array, rows: Any) -> jax.Array:
        loss = lambda flat: mean(given.loss()(params_of(flat), rows, ()))  # noqa: E731
        return jax.jvp(jax.grad(loss), (flat,), (v,))[1]

    def ggn(flat: jax.Array, v: jax.Array, rows: Any) -> jax.Array:
        def model(flat: jax.Array) -> jax.Array:
            return outputs(params_of(flat), rows)

        def nll(z_BTV: jax.Array) -> jax.Array:
            targets_BT = rows.tokens_BT[:, -given.sizes.completion :]
            logp_BTV = jax.nn.log_softmax(z_BTV)
            return -jnp.sum(jnp.take_along_axis(logp_BTV, targets_BT[:, :, None], axis=-1)) / given.sizes.rows

        z, dz = jax.jvp(model, (flat,), (v,))
        curved = jax.jvp(jax.grad(nll), (z,), (dz,))[1]
        return jax.vjp(model, flat)[1](curved)[0]

    flat_point, point_of = flatten(on.point)
    flat_start, _ = flatten(jax.tree.map(lambda x: x[0], on.block))
    tridiagonal = decomp.tridiag_sym(LANCZOS, custom_vjp=False)

    def lanczos(flat: jax.Array, start: jax.Array, rows: Any, fixed: Any) -> tuple[jax.Array, jax.Array]:
        def product(v: jax.Array) -> jax.Array:
            loss = lambda flat: mean(on.loss(point_of(flat), rows, fixed))  # noqa: E731
            return jax.jvp(jax.grad(loss), (flat,), (v,))[1]

        found = tridiagonal(product, start)
        values, y = jnp.linalg.eigh(found.J_small)
        return values, y.T @ found.Q_tall

    made = {
        "matfree Hv": (hv, flat_params, flat_v, micro),
        "matfree GGN": (ggn, flat_params, flat_v, micro),
        "matfree Lanczos": (lanczos, flat_point, flat_start, micro, on.fixed),
    }
    tasks = {name: compiled(f"bench {name}", *made[name])[0] for name in made}
    return tasks, [
        Line("matfree: Hv", {"matfree Hv": 1}, IN_GRADIENTS),
        Line("matfree: GGN product", {"matfree GGN": 1}, IN_GRADIENTS),
        Line(f"matfree: Lanczos of {LANCZOS} / {LANCZOS} products", {"matfree Lanczos": 1}, {ON_ROUTE: LANCZOS}),
    ]


def curvlinops(given: Problem) -> tuple[dict[str, Task], list[Line]]:
    """curvlinops' Hessian product, its Gauss–Newton product and torch's own gradient. Each is called once here.

    From then on transformers shows no progress bars in this process.

    Args:
      given: the problem on all parameters.

    Returns:
      the tasks with their FLOPs by name, "curvlinops Hv", "curvlinops GGN" and "torch gradient"; and the lines of the
      table. The lines divide by "torch gradient", and the last one by the task "gradient" of `whole_tasks`, which the
      caller has to measure too. If torch or curvlinops is not installed: no tasks, and a line that says so.
    """
    if not installed("torch", "curvlinops"):
        return {}, [Line("curvlinops", reason="torch or curvlinops is not installed")]
    torch, operators = importlib.import_module("torch"), importlib.import_module("curvlinops")
    network, weights = torch_network(given)
    tokens = torch.from_numpy(np.array(given.micro.tokens_BT, np.int64))
    targets = tokens[:, -given.sizes.completion :].reshape(-1)
    loss = torch.nn.CrossEntropyLoss()
    direction = torch.from_numpy(exported(given.v, [name for name, _ in network.named_parameters()]))

    def task(call: Callable[[], Any]) -> Task:
        return Task(call, flops=torch_flops(call))

    def product(kind: Any) -> Task:
        data = [(tokens, targets)]
        operator = kind(network, loss, weights, data, check_deterministic=False, num_data=len(tokens))
        return task(lambda: operator @ direction)

    under = {TORCH_GRADIENT: 1.0}
    tasks = {
        TORCH_GRADIENT: task(lambda: torch.autograd.grad(loss(network(tokens), targets), weights)),
        "curvlinops Hv": product(operators.HessianLinearOperator),
        "curvlinops GGN": product(operators.GGNLinearOperator),
    }
    return tasks, [
        Line("curvlinops: Hv / torch gradient", {"curvlinops Hv": 1}, under),
        Line("curvlinops: GGN product / torch gradient", {"curvlinops GGN": 1}, under),
        Line("torch: gradient", {TORCH_GRADIENT: 1}, IN_GRADIENTS),
    ]


def torch_network(given: Problem) -> tuple[Any, list[Any]]:
    """The problem's decoder as a torch module with the same weights, in evaluation mode on the CPU.

    It needs torch and transformers. The module is a `transformers` model with plain attention, whose SiLU is replaced
    by x·sigmoid(x). The weights pass through a temporary folder. From then on transformers shows no progress bars in
    this process.

    Args:
      given: the problem.

    Returns:
      the module, which maps token ids [B, T] to the logits that predict the completion tokens, float32 [B · Tc, V]; and
      the list of its parameters, in the order of its `named_parameters()`.

    Raises:
      ImportError: if torch or transformers is not installed.
    """
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(Path(folder) / "model", given.params, given.model.config)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )

    class Silu(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * torch.sigmoid(x)

    class Completion(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any) -> Any:
            keep = given.sizes.completion + 1
            z = self.model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[:, :-1]
            return z.reshape(-1, z.shape[-1])

    for layer in model.model.layers:
        layer.mlp.act_fn = Silu()
    network = Completion().eval()
    return network, list(network.parameters())


def exported(vector: Any, names: list[str]) -> np.ndarray:
    """Concatenates a tree like the parameters into one vector.

    Args:
      vector: a tree like the parameters.
      names: parameter names of the module of `torch_network`, whose order the tensors have in the result.

    Returns:
      the vector, on the host, in the dtype of the tree; as long as all named parameters together.

    Raises:
      KeyError: if the tree has no tensor of one of the names.
    """
    tensors = huggingface.to_tensors(vector)
    return np.concatenate([tensors[name.removeprefix("model.")]().reshape(-1) for name in names])


def torch_flops(call: Callable[[], Any]) -> float:
    """FLOPs of the matrix products that torch dispatches in one call, also of those inside `torch.func` transforms.

    Products that torch has no formula for count 0.

    Args:
      call: the function to count; it is called once, without arguments.

    Raises:
      ImportError: if torch is not installed.
      Exception: whatever `call` raises.
    """
    dispatch = importlib.import_module("torch.utils._python_dispatch")
    formulas = importlib.import_module("torch.utils.flop_counter").flop_registry
    total = [0.0]

    class Count(dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            formula = formulas.get(function._overloadpacket)
            total[0] += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
            return out

    with Count():
        call()
    return total[0]


def flatten(params: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Concatenates a tree into one vector, which matfree needs; the rest of the package never flattens a tree.

    Args:
      params: a tree of arrays of one dtype, at least one.

    Returns:
      the vector [N], its leaves one after the other; and the function from such a vector to a tree like `params`.
    """
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])

    def tree_of(flat: jax.Array) -> Any:
        parts = jnp.split(flat, ends[:-1])
        return structure.unflatten(part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True))

    return jnp.concatenate([x.reshape(-1) for x in leaves]), tree_of

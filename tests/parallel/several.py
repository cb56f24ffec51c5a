"""What one process and several have to agree on; run as a script, one process of several.

python tests/parallel/several.py WORKDIR COORDINATOR PROCESSES PROCESS_ID WITH_CURVATURE
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import config, runtime
from mdrl_jax.analysis import probe, samples
from mdrl_jax.analysis.subspace import conflict
from mdrl_jax.evaluate import evaluate
from mdrl_jax.parallel import distributed
from mdrl_jax.progress import Step
from mdrl_jax.rl.trainer import Transforms, init_state
from mdrl_jax.second_order.lanczos import block_lanczos, random_block
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stages import grpo

FOUND = "found.npz"
RATE = 1e-3


def small(data: int, fsdp: int) -> config.Config:
    """A step, an evaluation and a little curvature of the embedded model."""
    c = config.default()
    c.stages, c.scored_domains = ("math",), ("math", "qa")
    c.mesh.data, c.mesh.fsdp = data, fsdp
    c.rollout.prompt_buckets, c.rollout.completion_buckets = (12,), (8,)
    c.rollout.parts = 2
    c.domains.n_train, c.domains.n_validation, c.domains.n_test = 32, 8, 16
    c.evaluate.samples, c.evaluate.batch = 2, 8
    c.train.prompts_per_step = c.train.group_size = 16
    c.train.grad_accum_steps, c.train.kl_every = 2, 1
    c.train.learning_rate = RATE
    c.analyze.prompts, c.analyze.group_size, c.analyze.batch, c.analyze.path_prompts = 32, 2, 8, 8
    return config.parse(c)


def measure(settings: config.Config, curvature: bool) -> dict[str, Any]:
    """Rollouts, rewards, loss, updated parameters and scores, whole on every process.

    With `curvature` also the gradient, jets, Hv and Lanczos, whose programs take most of the time to compile.
    """
    with runtime.make_pool(settings.rewards) as pool:
        built = runtime.build(settings, pool)
        with jax.set_mesh(built.mesh):
            return _measured(built, curvature)


def _measured(built: runtime.Runtime, curvature: bool) -> dict[str, Any]:
    stage = resolve_stages(built.config, ("math", "qa"))[0]
    params = built.base_params()
    programs = grpo.make_programs(built, stage, Transforms())
    state = init_state(programs.optimizer, params, programs.shardings)
    _, after, metrics = next(grpo.grpo_steps(built, stage, programs, state, params, 0, lambda *_: {}))
    step = {k: v for k, v in metrics.items() if not k.startswith("seconds")}
    sample = samples.draw(built, params, "qa")
    found = {
        "step": step,
        "updated": after.params,
        "sample": {name: getattr(sample, name) for name in ("tokens_PGT", "mask_PGT", "rewards_PG")},
        "scores": evaluate(built, after.params, "scores", _untold).record(),
    }
    if curvature:
        found |= _curvature(built, params, after.params, sample)
    leaves = jax.tree_util.tree_leaves_with_path(distributed.gather(jax.tree.map(jnp.asarray, found, is_leaf=_is_list)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _curvature(built: runtime.Runtime, params: Any, after: Any, sample: samples.Sample) -> dict[str, Any]:
    looked = probe.build(built, built.config.train.grpo)
    rows = looked.rows(sample)
    route = conflict.route(np.arange(built.model.config.d_mlp)[None].repeat(built.model.config.n_layers, 0) % 8 == 0)
    at = conflict.place(looked, params, looked.difference(after, params), route)
    hessian = looked.hessian(at.point, at.fixed, rows, float(sample.n_prompts))
    block = random_block(jax.random.key(0), at.point, 2)
    spectrum = block_lanczos(hessian, block, 3, 3)
    return {
        "gradient": looked.gradient(params, rows[0]),
        "jets": looked.jets(params, looked.difference(after, params), sample),
        "activity": list(vars(looked.activity(params, sample)).values()),
        "hv": hessian(block),
        "lanczos": {"values": spectrum.values, "residuals": spectrum.residuals},
    }


def _is_list(x: Any) -> bool:
    return isinstance(x, list) and not isinstance(x[0], np.ndarray)


def _untold(label: str, total: int) -> Any:
    return contextlib.nullcontext(Step(label, total).report)


if __name__ == "__main__":
    folder, coordinator, processes, process_id = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
    distributed.initialize(coordinator, processes, process_id, 60.0)
    distributed.check_shared(folder)
    arrays = measure(small(data=processes, fsdp=2), sys.argv[5] == "True")
    if distributed.is_first():
        np.savez(folder / FOUND, **arrays)
    sys.exit(distributed.finish(0))

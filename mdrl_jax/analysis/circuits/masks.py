"""Masks on attention heads: forward passes with a source prompt's head outputs, and the search for a circuit.

A pair is a base prompt x, a source prompt x' of the same length, and a reply y of either. Both prompts run through the
same model with the reply y appended. In the masked pass on (x, y) the output of head h is

    ã_h = (1 − m_h) · a_h + m_h · a_h(x', y),

at every token, with a_h the output in the masked pass itself, so that a head sees what the masks changed in the layers
before it [chosen]. The search minimises a loss (`loss_of`) plus λ Σ m_h, with m = sigmoid(logit / τ) and τ annealed
geometrically. It ends with the heads of m > 0.5. From there `settle` puts in and takes out heads that lower the loss.

Functions here are of arrays. N pairs make rows [N, 2]: first the source's reply, then the base's. A mask is [L, H].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mdrl_jax.model.attention import ChangeHeads
from mdrl_jax.model.cache import Prefix
from mdrl_jax.model.packing import Grouped
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.programs import program

TEMPERATURES = (1.0, 0.05)  # τ of the first and of the last step
STARTS = (-1.0, 1.0)  # logits at the start: almost no head, and almost every head
LEAST_GAIN = 1e-6  # of the loss by a head that is put in or taken out; below it float32 rounds
JITTER = 0.1  # standard deviation of the logits at the start, which makes the seeds of masks differ


@struct.dataclass
class PairRows:
    """N pairs with both replies, as rows of T tokens: prompts padded on the left, then replies padded on the right.

    The arrays are on the devices or on the host.

    Attributes:
      base_N2T, source_N2T: token ids of the base and of the source prompt, with the source's reply and with the base's.
      valid_N2T: True at real tokens, equal for base and source.
      reply_N2C: 1 at tokens of the replies, the last C of the T tokens.
      same: how many tokens at the start of the rows are equal in base and source, in every pair; at most T − C − 1.
        Masks change nothing there, so base and source share one run of these tokens.
    """

    base_N2T: Any
    source_N2T: Any
    valid_N2T: Any
    reply_N2C: Any
    same: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Shared:
    """What all masked passes of one model on the same pairs have in common.

    Attributes:
      source_LRQHh: the outputs of all heads on the source prompts.
      before: keys and values of the first `PairRows.same` tokens; None if there are none.
    """

    source_LRQHh: jax.Array
    before: Prefix | None


@dataclasses.dataclass(frozen=True)
class Search:
    """How masks are sought.

    Attributes:
      steps: steps of Adam.
      learning_rate: of Adam.
      at_once: masks whose passes run together.
      loss: one of `config.CIRCUIT_LOSSES`.
    """

    steps: int = 100
    learning_rate: float = 0.1
    at_once: int = 4
    loss: str = "margin"


@dataclasses.dataclass(frozen=True)
class Programs:
    """The device programs of a decoder. Each takes parameters and `PairRows` as arguments.

    Attributes:
      at_once: K.
      loss: one of `config.CIRCUIT_LOSSES`.
      search: (params, rows, logits [R, L, H], λ [R]) -> the masks m at the end [R, L, H].
      shared: (params, rows) -> what all masked passes on these rows have in common, a `Shared`.
      log_probs: (params, rows, masks [K, L, H], shared, like) -> log π of both replies in the masked passes, in nats
        [K, N, 2] (`masked_log_probs`).
      inputs: (params, rows, mask [L, H], shared) -> the inputs of all layers in the masked pass [L, R, Q, D].
      slopes: (params, rows, mask [L, H], shared) -> the derivatives of log π of both replies of each pair by the mask
        [N, 2, L, H], at this mask.
      attribution: (params, rows) -> the score of each head by integrated gradients [L, H] (`attribution`).
    """

    at_once: int
    loss: str
    search: Callable[..., jax.Array]
    shared: Callable[..., Shared]
    log_probs: Callable[..., jax.Array]
    inputs: Callable[..., jax.Array]
    slopes: Callable[..., jax.Array]
    attribution: Callable[..., jax.Array]

    def settle(
        self, params: Any, rows: PairRows, circuits_RLH: np.ndarray, penalty_R: np.ndarray, tried: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Puts heads into each of R circuits and takes heads out, until no single change that is tried lowers its loss.

        The loss is `loss_of` + λ |C|. A round tries the change of `tried` heads: those whose change would give the
        least loss if log π of each reply were linear in m. Of the changes that lower the loss it makes the best 1, 2,
        4, … together, whichever number of them gives the least loss. The descent ends with the first round in which
        none lowers it; other heads are not tried then.

        Args:
          params: the parameters.
          rows: the pairs, on the devices.
          circuits_RLH: where each descent begins, boolean, on the host.
          penalty_R: λ of each.
          tried: heads that a round tries; L · H or more: all.

        Returns:
          (the circuits [R, L, H], their loss + λ |C| [R]).
        """
        passes = MaskedPasses(self, params, rows)
        shape = circuits_RLH.shape[1:]
        slopes = functools.cache(lambda circuit: passes.slopes(np.frombuffer(circuit, bool).reshape(shape)))
        whole_1N2 = passes.log_probs(np.ones((1, *shape)))
        seen: dict[bytes, np.ndarray] = {}  # log-probs; descents from several starts meet

        def log_probs(sets_KLH: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            """Of K circuits [K, N, 2]; `run` gives those of the circuits with these indices."""
            new = np.array([i for i, s in enumerate(sets_KLH) if s.tobytes() not in seen], int)
            if new.size:
                seen.update((sets_KLH[i].tobytes(), logp_N2) for i, logp_N2 in zip(new, run(new), strict=True))
            return np.stack([seen[s.tobytes()] for s in sets_KLH])

        def values(sets_KLH: np.ndarray, logp_KN2: np.ndarray, penalty: float) -> np.ndarray:
            return np.asarray(loss_of(self.loss, logp_KN2, whole_1N2), float) + penalty * sets_KLH.sum(axis=(1, 2))

        def promising(circuit_LH: np.ndarray, logp_N2: np.ndarray, penalty: float) -> np.ndarray:
            heads = np.arange(circuit_LH.size)
            if tried >= heads.size:
                return heads
            slope_N2H = slopes(circuit_LH.tobytes()).reshape(*logp_N2.shape, -1)
            linear_KN2 = logp_N2 + np.moveaxis(slope_N2H * np.where(circuit_LH, -1.0, 1.0).ravel(), -1, 0)
            return np.argsort(values(flipped(circuit_LH, heads), linear_KN2, penalty), kind="stable")[:tried]

        def descend(circuit_LH: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
            sets = circuit_LH[None]
            logp = log_probs(sets, lambda _: passes.log_probs(sets))
            (value,) = values(sets, logp, penalty)
            while True:
                heads, change = promising(circuit_LH, logp[0], penalty), passes.changes(circuit_LH)
                sets = flipped(circuit_LH, heads)
                of_one = values(sets, log_probs(sets, lambda new, run=change, of=heads: run(of[new])), penalty)
                better = heads[np.argsort(of_one, kind="stable")][: int(np.sum(of_one < value - LEAST_GAIN))]
                if not better.size:
                    return circuit_LH, float(value)
                sizes = 2 ** np.arange(int(np.log2(better.size)) + 1)
                sets = circuit_LH ^ np.logical_or.accumulate(flipped(np.zeros_like(circuit_LH), better))[sizes - 1]
                logp = log_probs(sets, lambda new, of=sets: passes.log_probs(of[new]))
                of_all = values(sets, logp, penalty)
                best = int(of_all.argmin())
                circuit_LH, logp, value = sets[best], logp[[best]], of_all[best]

        ends = [descend(c, float(p)) for c, p in zip(circuits_RLH, penalty_R, strict=True)]
        return np.stack([circuit for circuit, _ in ends]), np.array([value for _, value in ends])


class MaskedPasses:
    """Masked passes of one model on the same pairs; what does not depend on the mask is run once."""

    def __init__(self, programs: Programs, params: Any, rows: PairRows) -> None:
        """Runs what the passes share.

        Args:
          programs: the programs of the model's decoder.
          params: its parameters.
          rows: the pairs, on the devices.
        """
        self._programs, self._given = programs, (params, rows)
        self._shared = programs.shared(params, rows)

    def log_probs(self, masks_KLH: np.ndarray) -> np.ndarray:
        """log π of both replies with any number of masks, on the host, in nats [K, N, 2]."""
        return self._run(masks_KLH)

    def slopes(self, mask_LH: np.ndarray) -> np.ndarray:
        """The derivatives of log π of both replies of each pair by the mask, on the host [N, 2, L, H]."""
        return np.asarray(distributed.gather(self._programs.slopes(*self._given, as_float(mask_LH), self._shared)))

    def changes(self, mask_LH: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Passes with a mask of which a single head is changed from 0 to 1 or from 1 to 0.

        A changed head changes nothing in the layers before its own, so these are run once for all changes. Passes that
        run together begin at the earliest layer of their heads.

        Args:
          mask_LH: the mask, of 0 and 1.

        Returns:
          the function (indices of heads in the flat mask [K]) -> log π of both replies with each of them changed, in
          nats [K, N, 2].
        """
        inputs = functools.cache(lambda: self._programs.inputs(*self._given, as_float(mask_LH), self._shared))

        def run(heads_K: np.ndarray) -> np.ndarray:
            by_layer, n_heads = np.sort(heads_K), mask_LH.shape[1]
            like = lambda at: (inputs(), np.int32(by_layer[at] // n_heads))  # noqa: E731
            made = self._run(flipped(mask_LH, by_layer), like)
            return made[np.searchsorted(by_layer, heads_K)]

        return run

    def _run(self, masks_KLH: np.ndarray, like: Callable[[int], Any] | None = None) -> np.ndarray:
        """Passes with K masks; `like` makes an argument from the index of the first one of those that run together."""
        n = len(masks_KLH)
        width = 1 if n == 1 and like is None else self._programs.at_once
        filled = np.pad(as_float(masks_KLH), ((0, -n % width), (0, 0), (0, 0)), mode="edge")
        made = [
            self._programs.log_probs(*self._given, filled[at : at + width], self._shared, like and like(at))
            for at in range(0, n, width)
        ]
        return np.concatenate(distributed.gather(made))[:n]


def flipped(mask_LH: np.ndarray, heads_K: np.ndarray) -> np.ndarray:
    """K copies of a mask of 0 and 1, each with one head changed [K, L, H]; heads are indices in the flat mask."""
    out_KLH = np.repeat(mask_LH[None].astype(bool), len(heads_K), axis=0)
    out_KLH.reshape(len(heads_K), -1)[np.arange(len(heads_K)), heads_K] ^= True
    return out_KLH


def as_float(mask: np.ndarray) -> np.ndarray:
    """A mask on the host as the programs take it."""
    return np.asarray(mask, np.float32)


@functools.lru_cache(maxsize=2)
def build(model: Decoder, temperature: float, how: Search, points: int = 5) -> Programs:
    """Makes the programs; each is compiled at its first call.

    Args:
      model: the decoder.
      temperature: of the policy (definitions §1).
      how: the search.
      points: of the path of the integrated gradients.
    """
    return Programs(
        how.at_once,
        how.loss,
        program("circuit_search", functools.partial(search, model, temperature, how)),
        program("circuit_shared", functools.partial(shared_by_passes, model, temperature)),
        program("circuit_log_probs", functools.partial(masked_log_probs, model, temperature)),
        program("circuit_inputs", functools.partial(masked_inputs, model, temperature)),
        program("circuit_slopes", functools.partial(slopes, model, temperature)),
        program("circuit_attribution", functools.partial(attribution, model, temperature, points)),
    )


def mix(out_RQHh: jax.Array, given: tuple[jax.Array, jax.Array]) -> jax.Array:
    """(1 − m_h) · a_h + m_h · a_h(source) of one layer; `given` is (source outputs [R, Q, H, h], m [H] or [R, H])."""
    source_RQHh, mask_H = given
    m_R1H1 = mask_H.reshape(-1, 1, out_RQHh.shape[2], 1).astype(out_RQHh.dtype)
    return out_RQHh + m_R1H1 * (source_RQHh - out_RQHh)


def start_logits(seeds: int, n_layers: int, n_heads: int, first_seed: int = 0) -> np.ndarray:
    """The logits that searches start from, [seeds · 2, L, H]: each seed at both of `STARTS`, with `JITTER`."""
    rng = np.random.default_rng([first_seed, n_layers, n_heads])
    noise = JITTER * rng.normal(size=(seeds, 1, n_layers, n_heads))
    return (noise + np.array(STARTS)[None, :, None, None]).reshape(-1, n_layers, n_heads).astype(np.float32)


class Passes:
    """Forward passes on pairs, which run nothing twice: a packed row is a prompt, followed by its one or two replies.

    The first `PairRows.same` tokens are run when the object is made, unless `shared` has them. A pass then runs the
    other Q tokens of a row.

    Attributes:
      before: keys and values of the first `PairRows.same` tokens; None if there are none.
      base_RQD, source_RQD: inputs of the first layer at these Q tokens, of the base and of the source prompts.
    """

    def __init__(
        self, model: Decoder, temperature: float, params: Any, rows: PairRows, shared: Shared | None = None
    ) -> None:
        """Embeds the tokens; without `shared` it also runs those that base and source share.

        Args:
          model: the decoder.
          temperature: of the policy.
          params: its parameters.
          rows: the pairs, each with one reply or with two.
          shared: of these parameters and pairs, if it was made before.
        """
        self._apply = cast(Callable[..., Any], functools.partial(model.apply, {"params": params}))
        self._temperature, self._shape = temperature, rows.reply_N2C.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape((-1, x.shape[-1])), rows)
        self._reply_BC, n = flat.reply_N2C, flat.reply_N2C.shape[1]
        self._tokens_BC = flat.base_N2T[:, -n:]
        self._rows = Grouped(flat.valid_N2T, flat.valid_N2T.shape[1] - n, self._shape[1])
        base, source = (self._rows.pack(x) for x in (flat.base_N2T, flat.source_N2T))
        self.before = None if shared is None else shared.before
        if rows.same and shared is None:
            valid = flat.valid_N2T[:: self._shape[1], : rows.same]
            self.before = self._apply(base[:, : rows.same], valid, method="prefill")[1]
        self.base_RQD, self.source_RQD = (self._apply(x[:, rows.same :], method="embed") for x in (base, source))

    def heads(self, x_RQD: jax.Array) -> jax.Array:
        """The outputs of all heads [L, R, Q, H, h] from the inputs of the first layer."""
        return self._through(x_RQD)[1]

    def inputs(self, x_RQD: jax.Array, change: ChangeHeads, given: Any) -> jax.Array:
        """The inputs of all layers [L, R, Q, D], with outputs of heads that `change` makes."""
        return self._through(x_RQD, change, given)[2]

    def log_probs(self, x_RQD: jax.Array, change: ChangeHeads, given: Any, first: Any = None) -> jax.Array:
        """log π of the replies [N, replies of a pair], in nats, with outputs of heads that `change` makes.

        x_RQD is the input of layer `first`, the first one that is run; None: layer 0.
        """
        hidden_RQD, _, _ = self._through(x_RQD, change, given, first)
        logits_BCV = self._apply(self._rows.predicting(hidden_RQD), method="logits") / self._temperature
        chosen_BC = jnp.take_along_axis(logits_BCV, self._tokens_BC[:, :, None], axis=-1)[:, :, 0]
        logp_B = jnp.sum((chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)) * self._reply_BC, axis=1)
        return logp_B.reshape(self._shape)

    def _through(self, x_RQD: jax.Array, change: Any = None, given: Any = None, first: Any = None) -> Any:
        return self._apply(x_RQD, self._rows, change, given, self.before, first, method="through_heads")


def loss_of(name: str, logp_KN2: Any, whole_1N2: Any) -> Any:
    """The loss of K masks, without the price of the heads.

    "margin" (chosen): Σ_n |Δ_n − Δ_n(M)| / Σ_n |Δ_n(M)|, with the margin Δ = log π(y') − log π(y) of each pair and M
    all heads. It is the share of the behaviour of all heads that a mask leaves out, and at least 1 − faithfulness. So λ
    has one meaning in every model, however confident. "log_prob" (published): the mean of −log π(y'), in nats. It is
    nearly 0 once a model is confident, so that few heads suffice although the margin is far from that of all heads.

    Args:
      name: one of `config.CIRCUIT_LOSSES`.
      logp_KN2: log π of both replies with each mask.
      whole_1N2: the same with all heads.

    Returns:
      the loss of each mask [K].
    """
    if name == "log_prob":
        return -logp_KN2[..., 0].mean(axis=1)
    margin_KN, whole_1N = (logp[..., 0] - logp[..., 1] for logp in (logp_KN2, whole_1N2))
    return abs(margin_KN - whole_1N).mean(axis=1) / abs(whole_1N).mean()


def _targets(rows: PairRows) -> PairRows:
    """The pairs with the source's reply alone."""
    return jax.tree.map(lambda x: x[:, :1], rows)


def shared_by_passes(model: Decoder, temperature: float, params: Any, rows: PairRows) -> Shared:
    """What all masked passes with these parameters and pairs have in common."""
    passes = Passes(model, temperature, params, rows)
    return Shared(jax.lax.stop_gradient(passes.heads(passes.source_RQD)), passes.before)


def masked_log_probs(
    model: Decoder,
    temperature: float,
    params: Any,
    rows: PairRows,
    mask_KLH: jax.Array,
    shared: Shared,
    like: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """log π of both replies of every pair, for K masks that run together.

    Args:
      model: the decoder.
      temperature: of the policy.
      params: its parameters.
      rows: the pairs.
      mask_KLH: the masks.
      shared: of these parameters and pairs, from `shared_by_passes`.
      like: (the inputs of all layers with another mask [L, R, Q, D], index of the first layer in which any of the masks
        differs from it). Earlier layers are not run. None: all layers are run.

    Returns:
      log-probs in nats [K, N, 2].
    """
    passes = Passes(model, temperature, params, rows, shared)
    x_RQD, first = (passes.base_RQD, None) if like is None else (like[0][like[1]], like[1])
    of_mask = lambda mask_LH: passes.log_probs(x_RQD, mix, (shared.source_LRQHh, mask_LH), first)  # noqa: E731
    return jax.vmap(of_mask)(mask_KLH)


def masked_inputs(
    model: Decoder, temperature: float, params: Any, rows: PairRows, mask_LH: jax.Array, shared: Shared
) -> jax.Array:
    """The inputs of all layers in the masked pass [L, R, Q, D]; arguments as in `masked_log_probs`."""
    passes = Passes(model, temperature, params, rows, shared)
    return passes.inputs(passes.base_RQD, mix, (shared.source_LRQHh, mask_LH))


def _loss(
    model: Decoder, temperature: float, how: Search, params: Any, rows: PairRows, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """The function mask [L, H] -> `loss_of` on these pairs."""
    if how.loss == "log_prob":  # it does not read the base's replies
        rows = _targets(rows)
    passes = Passes(model, temperature, params, rows)
    source = jax.lax.stop_gradient(passes.heads(passes.source_RQD))
    log_probs = lambda mask_LH: passes.log_probs(passes.base_RQD, mix, (source, mask_LH))  # noqa: E731
    whole_1N2 = log_probs(jnp.ones(shape))[None]
    return lambda mask_LH: loss_of(how.loss, log_probs(mask_LH)[None], whole_1N2)[0]


def slopes(
    model: Decoder, temperature: float, params: Any, rows: PairRows, mask_LH: jax.Array, shared: Shared
) -> jax.Array:
    """The derivatives of log π of both replies of each pair by the mask of each head, at a mask.

    Args:
      model: the decoder.
      temperature: of the policy.
      params: the parameters.
      rows: the pairs.
      mask_LH: the mask.
      shared: of these parameters and pairs, from `shared_by_passes`.

    Returns:
      the derivatives in nats [N, 2, L, H].
    """
    passes = Passes(model, temperature, params, rows, shared)
    of_masks = lambda mask_LNH: passes.log_probs(passes.base_RQD, mix, (shared.source_LRQHh, mask_LNH))  # noqa: E731
    # With a mask for each pair, one backward pass gives the derivatives of all pairs.
    logp_N2, back = jax.vjp(of_masks, jnp.repeat(mask_LH[:, None], len(rows.reply_N2C), axis=1))
    of_reply = [back(jnp.zeros_like(logp_N2).at[:, which].set(1.0))[0] for which in range(2)]
    return jnp.stack(of_reply).transpose(2, 0, 1, 3)


def search(
    model: Decoder,
    temperature: float,
    how: Search,
    params: Any,
    rows: PairRows,
    logits_RLH: jax.Array,
    penalty_R: jax.Array,
) -> jax.Array:
    """Head-level differential binary masking (definitions §11).

    Args:
      model: the decoder.
      temperature: of the policy.
      how: the search.
      params: the parameters.
      rows: the pairs.
      logits_RLH: where each of R masks starts (`start_logits`).
      penalty_R: λ of each mask.

    Returns:
      m [R, L, H] after the last step, at the last temperature.
    """
    loss_at = _loss(model, temperature, how, params, rows, logits_RLH.shape[1:])
    optimizer = optax.adam(how.learning_rate)
    first, last = TEMPERATURES
    annealed_S = first * (last / first) ** (jnp.arange(how.steps) / max(how.steps - 1, 1))

    def loss(logit_LH: jax.Array, penalty: jax.Array, annealed: jax.Array) -> jax.Array:
        mask_LH = jax.nn.sigmoid(logit_LH / annealed)
        return loss_at(mask_LH) + penalty * jnp.sum(mask_LH)

    def step(carry: tuple[jax.Array, Any], annealed: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        logits_RLH, state = carry
        one = lambda pair: jax.grad(loss)(*pair, annealed)  # noqa: E731
        gradient = jax.lax.map(one, (logits_RLH, penalty_R), batch_size=how.at_once)
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(logits_RLH, change), state), None  # pyright: ignore[reportReturnType]

    (logits_RLH, _), _ = jax.lax.scan(step, (logits_RLH, optimizer.init(logits_RLH)), annealed_S)
    return jax.nn.sigmoid(logits_RLH / last)


def attribution(model: Decoder, temperature: float, points: int, params: Any, rows: PairRows) -> jax.Array:
    """Attribution patching with integrated gradients, in the form of EAP-IG for nodes (arXiv 2403.17806).

    The score of head h is the mean over pairs of Σ_tokens (a_h(x') − a_h(x)) · mean_k ∂ log π(y')/∂a_h, with the
    gradient at the inputs x + (k/K)(x' − x) of the first layer, k = 1, …, K.

    Args:
      model: the decoder.
      temperature: of the policy.
      points: K.
      params: the parameters.
      rows: the pairs; only the source's replies are used.

    Returns:
      the scores in nats [L, H].
    """
    passes = Passes(model, temperature, params, _targets(rows))
    base, source = passes.heads(passes.base_RQD), passes.heads(passes.source_RQD)

    def log_prob(added_LRQHh: jax.Array, x_RQD: jax.Array) -> jax.Array:
        return jnp.mean(passes.log_probs(x_RQD, lambda out, added: out + added, added_LRQHh))

    def add(total: jax.Array, share: jax.Array) -> tuple[jax.Array, None]:
        at = passes.base_RQD + share.astype(passes.base_RQD.dtype) * (passes.source_RQD - passes.base_RQD)
        return total + jax.grad(log_prob)(jnp.zeros_like(base), at) / points, None

    slope, _ = jax.lax.scan(add, jnp.zeros_like(base), jnp.arange(1, points + 1, dtype=jnp.float32) / points)
    return jnp.sum(slope * (source - base), axis=(1, 2, 4), dtype=jnp.float32)

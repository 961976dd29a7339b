"""The test oracle: the whole model once more, slow and plain, in float64.

It shares no code and no algorithm with :mod:`moe_jax.model`: every token goes through every expert and a
dense weight mask picks the result, attention is an explicit L x L softmax per sequence and head, rotary is a
complex product, top-k is repeated argmax, softmax and log-softmax are written by definition. Tests compare
every deployment with it.

Shape letters: B batch, L length, D d_model, V vocabulary, H query heads, G key/value heads, A head width,
E experts, F expert hidden width, K choices a token, N layers. ``jax_enable_x64`` must be on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_jax.config.schema import ModelConfig

Tree = dict[str, Any]

# Unrolled heads and experts are much code that runs for milliseconds: optimising it costs more than it saves.
_jit = functools.partial(
    jax.jit, static_argnames="cfg", compiler_options={"xla_backend_optimization_level": 0}
)


def head_sizes(cfg: ModelConfig) -> tuple[int, int, int]:
    """(H, G, A): query heads, key/value heads, width of one head."""
    num_kv_heads = cfg.num_heads if cfg.num_kv_heads is None else cfg.num_kv_heads
    head_dim = cfg.d_model // cfg.num_heads if cfg.head_dim is None else cfg.head_dim
    return cfg.num_heads, num_kv_heads, head_dim


def oracle_logits(params: Tree, ids_BL: Any, cfg: ModelConfig) -> jax.Array:
    """Next-token logits, float64 [B, L, V], of token ids int [B, L]."""
    return _jit_forward(_float64(params), np.asarray(ids_BL), cfg)[0]


def oracle_expert_ids(params: Tree, ids_BL: Any, cfg: ModelConfig) -> np.ndarray:
    """Chosen experts, int [N, B, L, K], best first."""
    return np.asarray(_jit_forward(_float64(params), np.asarray(ids_BL), cfg)[2])


def oracle_loss(params: Tree, ids_BL: Any, targets_BL: Any, cfg: ModelConfig) -> tuple[jax.Array, Tree]:
    """The training loss, a float64 scalar, and its parts.

    Parts: ``cross_entropy``, ``balance_loss`` and ``z_loss`` (before their weights), and
    ``tokens_per_expert_NE``, the (token, choice) pairs of each expert. Differentiable in ``params``.
    """
    return _jit_loss(_float64(params), np.asarray(ids_BL), np.asarray(targets_BL), cfg)


def oracle_grads(params: Tree, ids_BL: Any, targets_BL: Any, cfg: ModelConfig) -> Tree:
    """Gradient of :func:`oracle_loss` in every parameter, a float64 tree like ``params``."""
    return _jit_grads(_float64(params), np.asarray(ids_BL), np.asarray(targets_BL), cfg)


def _float64(params: Tree) -> Tree:
    """In float64, and on one device wherever the arrays came from (under jax.grad they are tracers)."""
    return jax.tree.map(
        lambda w: w.astype(jnp.float64) if isinstance(w, Tracer) else np.asarray(w, np.float64),
        params,
    )


def _forward(params: Tree, ids_BL: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits_BLV, router_BNLE, chosen_BNLK = jax.vmap(lambda ids_L: _sequence(params, ids_L, cfg))(ids_BL)
    return logits_BLV, jnp.swapaxes(router_BNLE, 0, 1), jnp.swapaxes(chosen_BNLK, 0, 1)


def _loss(params: Tree, ids_BL: jax.Array, targets_BL: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, Tree]:
    logits_BLV, router_NBLE, chosen_NBLK = _forward(params, ids_BL, cfg)
    num_tokens = ids_BL.size
    pick_BLV = targets_BL[:, :, None] == jnp.arange(cfg.vocab_size, dtype=targets_BL.dtype)[None, None, :]
    cross_entropy = -jnp.sum(jnp.where(pick_BLV, jnp.log(_softmax(logits_BLV)), 0.0)) / num_tokens

    prob_sum_NE = jnp.sum(_softmax(router_NBLE), axis=(1, 2))
    count_NE = jnp.stack([jnp.sum(chosen_NBLK == e, axis=(1, 2, 3)) for e in range(cfg.num_experts)], axis=1)
    balance_N = jnp.sum(count_NE.astype(jnp.float64) * prob_sum_NE, axis=1)
    balance_N = balance_N * (cfg.num_experts / (cfg.top_k * num_tokens**2))
    log_sum_NBL = jnp.log(jnp.sum(jnp.exp(router_NBLE), axis=-1))
    parts = {
        "cross_entropy": cross_entropy,
        "balance_loss": jnp.sum(balance_N) / cfg.num_layers,
        "z_loss": jnp.sum(log_sum_NBL**2) / (cfg.num_layers * num_tokens),
        "tokens_per_expert_NE": count_NE,
    }
    loss = (
        cross_entropy + cfg.balance_loss_weight * parts["balance_loss"] + cfg.z_loss_weight * parts["z_loss"]
    )
    return loss, parts


def _grads(params: Tree, ids_BL: jax.Array, targets_BL: jax.Array, cfg: ModelConfig) -> Tree:
    return jax.grad(lambda p: _loss(p, ids_BL, targets_BL, cfg)[0])(params)


_jit_forward, _jit_loss, _jit_grads = _jit(_forward), _jit(_loss), _jit(_grads)


def _sequence(params: Tree, ids_L: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One sequence through the model: logits [L, V], router logits [N, L, E], chosen experts [N, L, K]."""

    def layer(x_LD: jax.Array, block: Tree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x_LD = x_LD + _attention(block["attention"], rms(x_LD, block["attention_norm"]["scale"], cfg), cfg)
        y_LD, router_LE, chosen_LK = _moe(block, rms(x_LD, block["moe_norm"]["scale"], cfg), cfg)
        return x_LD + y_LD, (router_LE, chosen_LK)

    x_LD = params["embed"]["table"][ids_L]
    x_LD, (router_NLE, chosen_NLK) = jax.lax.scan(layer, x_LD, params["blocks"])  # a loop: compiled once
    y_LD = rms(x_LD, params["final_norm"]["scale"], cfg)
    w_DV = params["embed"]["table"].T if cfg.tie_embeddings else params["head"]["w"]
    return y_LD @ w_DV, router_NLE, chosen_NLK


def _take(tree: Tree, index: int) -> Tree:
    return jax.tree.map(lambda w: w[index], tree)


def rms(x_LD: jax.Array, scale_D: jax.Array, cfg: ModelConfig) -> jax.Array:
    """RMSNorm: x over the root of its mean square (plus norm_eps), times the scale."""
    mean_square_L1 = jnp.sum(x_LD * x_LD, axis=-1, keepdims=True) / cfg.d_model
    return x_LD / jnp.sqrt(mean_square_L1 + cfg.norm_eps) * scale_D[None, :]


def _softmax(x: jax.Array) -> jax.Array:
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def rotate(x_LA: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding: dims i and i + A/2 are one complex number, turned by position * theta^(-2i/A)."""
    length, width = x_LA.shape
    half = width // 2
    angle = np.arange(length)[:, None] * theta ** (-2.0 * np.arange(half)[None, :] / width)
    turned = jax.lax.complex(x_LA[:, :half], x_LA[:, half:]) * jnp.asarray(np.exp(1j * angle))
    return jnp.concatenate([jnp.real(turned), jnp.imag(turned)], axis=1)


def _attention(w: Tree, x_LD: jax.Array, cfg: ModelConfig) -> jax.Array:
    num_heads, num_kv_heads, width = head_sizes(cfg)
    length = x_LD.shape[0]
    may_see_LL = np.tril(np.ones((length, length), bool))
    y_LD = jnp.zeros_like(x_LD)
    for h in range(num_heads):
        g = h // (num_heads // num_kv_heads)
        q_LA = rotate(x_LD @ w["w_q"][:, h], cfg.rope_theta)
        k_LA = rotate(x_LD @ w["w_k"][:, g], cfg.rope_theta)
        v_LA = x_LD @ w["w_v"][:, g]
        scores_LL = jnp.where(may_see_LL, q_LA @ k_LA.T / np.sqrt(width), -jnp.inf)
        y_LD = y_LD + (_softmax(scores_LL) @ v_LA) @ w["w_o"][h]
    return y_LD


def activation(x: jax.Array, name: str) -> jax.Array:
    """gelu (its tanh form), silu or relu, elementwise."""
    if name == "gelu":
        return 0.5 * x * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x / (1.0 + jnp.exp(-x))
    assert name == "relu", name
    return jnp.maximum(x, 0.0)


def _mlp(x_LD: jax.Array, w: Tree, cfg: ModelConfig) -> jax.Array:
    hidden_LF = x_LD @ w["w_up"]
    if cfg.expert_type == "gated":
        hidden_LF = activation(x_LD @ w["w_gate"], cfg.activation) * hidden_LF
    else:
        hidden_LF = activation(hidden_LF, cfg.activation)
    return hidden_LF @ w["w_down"]


def _moe(block: Tree, x_LD: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every token through every expert, weighted by a mask: output [L, D], router logits, chosen experts."""
    router_LE = x_LD @ block["router"]["w"]
    prob_LE = _softmax(router_LE)
    left_LE = prob_LE
    chosen = []
    for _ in range(cfg.top_k):
        best_L = jnp.argmax(left_LE, axis=-1)  # the lowest index where values tie
        chosen.append(best_L)
        left_LE = jnp.where(best_L[:, None] == jnp.arange(cfg.num_experts)[None, :], -jnp.inf, left_LE)
    weight_LE = jnp.where(jnp.isneginf(left_LE), prob_LE, 0.0)
    if cfg.renormalize_top_k:
        weight_LE = weight_LE / jnp.sum(weight_LE, axis=-1, keepdims=True)
    y_LD = jnp.zeros_like(x_LD)
    for e in range(cfg.num_experts):
        y_LD = y_LD + weight_LE[:, e, None] * _mlp(x_LD, _take(block["experts"], e), cfg)
    if cfg.num_shared_experts:
        y_LD = y_LD + _mlp(x_LD, block["shared"], cfg)
    return y_LD, router_LE, jnp.stack(chosen, axis=-1)


def random_params(cfg: ModelConfig, seed: int = 0, scale: float = 1.0) -> Tree:
    """A float64 numpy parameter tree with nothing near zero, unlike a real initialisation.

    At ``scale`` 1 every matrix keeps the size of what it multiplies (normal, 1 / sqrt(fan-in)); the router's
    logits have a spread of about 2, and norm scales lie in [0.5, 1.5]. ``scale`` multiplies all matrices.
    """
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads, width = head_sizes(cfg)
    layers, d_model, hidden, experts = cfg.num_layers, cfg.d_model, cfg.expert_hidden, cfg.num_experts

    def normal(*shape: int, fan_in: int) -> np.ndarray:
        return rng.standard_normal(shape) * (scale / np.sqrt(fan_in))

    def norm(*shape: int) -> Tree:
        return {"scale": rng.uniform(0.5, 1.5, shape)}

    def mlp(*lead: int, width_F: int) -> Tree:
        tree = {"w_up": normal(*lead, d_model, width_F, fan_in=d_model)}
        if cfg.expert_type == "gated":
            tree["w_gate"] = normal(*lead, d_model, width_F, fan_in=d_model)
        tree["w_down"] = normal(*lead, width_F, d_model, fan_in=width_F)
        return tree

    blocks: Tree = {
        "attention_norm": norm(layers, d_model),
        "attention": {
            "w_q": normal(layers, d_model, num_heads, width, fan_in=d_model),
            "w_k": normal(layers, d_model, num_kv_heads, width, fan_in=d_model),
            "w_v": normal(layers, d_model, num_kv_heads, width, fan_in=d_model),
            "w_o": normal(layers, num_heads, width, d_model, fan_in=num_heads * width),
        },
        "moe_norm": norm(layers, d_model),
        "router": {"w": 2.0 * normal(layers, d_model, experts, fan_in=d_model)},
        "experts": mlp(layers, experts, width_F=hidden),
    }
    if cfg.num_shared_experts:
        blocks["shared"] = mlp(layers, width_F=cfg.num_shared_experts * hidden)
    params: Tree = {"embed": {"table": normal(cfg.vocab_size, d_model, fan_in=1)}, "blocks": blocks}
    params["final_norm"] = norm(d_model)
    if not cfg.tie_embeddings:
        params["head"] = {"w": normal(d_model, cfg.vocab_size, fan_in=d_model)}
    return params


def force_routing(params: Tree, cfg: ModelConfig, kind: str, expert: int = 0) -> Tree:
    """Copies ``params`` so that a token's id alone decides its experts, in every layer and at any position.

    kind:
      ``balanced``      id v goes to experts v + n, v + n + 1, v + n - 1, ... (mod E) in layer n; ids that
                        hold every residue mod E equally often (:func:`balanced_ids`) load all equally.
      ``one_expert``    every token's first choice is ``expert``; the others as in ``balanced``.
      ``same_experts``  every token chooses the same K experts: ``expert``, ``expert`` + 1, ... (mod E).
      ``empty_expert``  no token ever chooses ``expert`` (needs top_k < E).

    Why it holds: attention and experts never write dims 0-2 of the residual stream, so these stay the
    embedding's: a 1, and the cosine and sine of 2 pi v / E. The router reads these dims only, so up to the
    positive factor of RMSNorm its logits are cos(2 pi (v + n - e + 1/4) / E) plus a constant of the expert,
    and a constant above 2 beats any cosine. Needs d_model > 3.
    """
    num_experts = cfg.num_experts
    assert cfg.d_model > 3, cfg.d_model
    assert 0 <= expert < num_experts, (expert, num_experts)
    params = jax.tree.map(lambda w: np.array(w, np.float64), params)
    blocks = params["blocks"]
    writers = [blocks["attention"]["w_o"], blocks["experts"]["w_down"]]
    if cfg.num_shared_experts:
        writers.append(blocks["shared"]["w_down"])
    for w in writers:
        w[..., :3] = 0.0
    turn_V = 2 * np.pi * np.arange(cfg.vocab_size) / num_experts
    params["embed"]["table"][:, :3] = np.stack([np.ones_like(turn_V), np.cos(turn_V), np.sin(turn_V)], axis=1)
    blocks["moe_norm"]["scale"][:, :3] = 1.5

    bonus_E = np.zeros(num_experts)
    if kind == "one_expert":
        bonus_E[expert] = 2.5
    elif kind == "same_experts":
        for choice in range(cfg.top_k):
            bonus_E[(expert + choice) % num_experts] = 2.5
    elif kind == "empty_expert":
        assert cfg.top_k < num_experts, (cfg.top_k, num_experts)
        bonus_E[expert] = -2.5
    else:
        assert kind == "balanced", kind
    turn_NE = (
        2
        * np.pi
        * (np.arange(num_experts)[None, :] - np.arange(cfg.num_layers)[:, None] - 0.25)
        / num_experts
    )
    bonus_NE = np.broadcast_to(bonus_E, turn_NE.shape)
    blocks["router"]["w"][...] = 0.0
    blocks["router"]["w"][:, :3] = np.stack([bonus_NE, np.cos(turn_NE), np.sin(turn_NE)], axis=1)
    return params


def balanced_ids(cfg: ModelConfig, batch_size: int, seq_len: int, seed: int = 0) -> np.ndarray:
    """Shuffled ids int32 [B, L] that load all experts equally under ``force_routing(..., "balanced")``.

    B * L must be a multiple of num_experts, and vocab_size at least num_experts.
    """
    num_tokens = batch_size * seq_len
    assert num_tokens % cfg.num_experts == 0, (num_tokens, cfg.num_experts)
    assert cfg.vocab_size >= cfg.num_experts, (cfg.vocab_size, cfg.num_experts)
    usable = cfg.vocab_size - cfg.vocab_size % cfg.num_experts
    ids = np.arange(num_tokens) % usable
    return np.random.default_rng(seed).permutation(ids).reshape(batch_size, seq_len).astype(np.int32)

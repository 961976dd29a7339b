"""AdamW with warm-up and cosine decay (Loshchilov and Hutter 2019), from optax."""

import jax
import jax.numpy as jnp
import optax

from moe_jax.config.schema import TrainConfig


def learning_rate_schedule(cfg: TrainConfig) -> optax.Schedule:
    """Linear warm-up over warmup_steps, then a cosine down to final_lr_fraction of the peak.

    Takes the number of steps done before this one (int32 scalar); returns a float32 scalar. The first step
    has 1 / warmup_steps of the peak, the last one the final rate.
    """
    if cfg.warmup_steps >= cfg.steps:  # no step is left to decay in
        schedule = optax.schedules.linear_schedule(0.0, cfg.learning_rate, max(1, cfg.warmup_steps))
    else:
        schedule = optax.schedules.warmup_cosine_decay_schedule(
            init_value=0.0 if cfg.warmup_steps else cfg.learning_rate,
            peak_value=cfg.learning_rate,
            warmup_steps=cfg.warmup_steps,
            decay_steps=cfg.steps,
            end_value=cfg.learning_rate * cfg.final_lr_fraction,
        )
    return lambda step: jnp.asarray(schedule(jnp.asarray(step, jnp.float32) + 1.0), jnp.float32)


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """AdamW; weight decay on matrices only. Elementwise, so that it may run on any part of the parameters.

    Clipping is not in it: the global norm is a sum over all devices' parts (train.step).
    """

    def is_matrix(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)

    adamw = optax.adamw(
        learning_rate_schedule(cfg),
        b1=cfg.adam_b1,
        b2=cfg.adam_b2,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        mask=is_matrix,
    )

    def update(updates, state, params=None):
        # optax mixes int32 counts with floats; callers may have forbidden that for their own code.
        with jax.numpy_dtype_promotion("standard"):
            return adamw.update(updates, state, params)

    return optax.GradientTransformation(adamw.init, update)

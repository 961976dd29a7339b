"""The public API behind moe_jax/__init__.py: load a checkpoint, or build a model and its training step."""

import math
import operator
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from moe_jax.checkpoint import open_checkpoint
from moe_jax.config import check_deployment, check_run, from_dict, parse_deployment
from moe_jax.config.schema import DeploymentConfig, ModelConfig, RunConfig
from moe_jax.deployments import Deployment, create
from moe_jax.deployments.program import gather_params
from moe_jax.infer.generate import Generator
from moe_jax.model.transformer import cast_for_compute
from moe_jax.train.step import Trainer


class Model:
    """A model on its deployment: logits and generation.

    ``config`` is the ModelConfig, ``deployment`` the Deployment it runs in.
    """

    def __init__(self, deployment: Deployment, make_params: Callable[[], dict]):
        """make_params gives the parameters in the layout of use, as multiplied; called when first needed."""
        self.deployment = deployment
        self.renew(make_params)

    def renew(self, make_params: Callable[[], dict]) -> None:
        """Take other weights from here on."""
        self._make_params, self._params = make_params, None

    @property
    def params(self) -> dict:
        """The parameters in the layout of use, as multiplied."""
        if self._params is None:
            self._params = self._make_params()
        return self._params

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.deployment.model_config

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.deployment)

    def logits(self, ids_BL) -> jax.Array:
        """Next-token logits at every position: int [B, L] -> float32 [B, L, V] (float64 for a float64 model).

        Causal: position l sees ids 0 .. l. Any B and L (B is padded to what the mesh divides, and cut again).
        Raises ValueError for ids that are not a 2-D integer array or lie outside of the vocabulary.
        """
        return self.deployment.logits(self.params, self._checked_ids(ids_BL))

    def generate(self, ids_BL, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> np.ndarray:
        """The prompts continued: int [B, L] -> int32 [B, L + max_new_tokens].

        temperature 0 takes the most likely token; above 0 it samples by (seed, sequence index, position), the
        same in every deployment up to rounding. Raises ValueError for bad arguments.
        """
        ids_BL = self._checked_ids(ids_BL)
        new = list(self.stream(ids_BL, max_new_tokens, temperature, seed))
        return np.concatenate([ids_BL, np.stack(new, axis=1)], axis=1) if new else ids_BL

    def stream(
        self, ids_BL, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """As generate, yielding the next token of every sequence, int32 [B], as each is made."""
        ids_BL = self._checked_ids(ids_BL)
        max_new_tokens, seed = operator.index(max_new_tokens), operator.index(seed)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give 0 or more")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; give an integer from 0 to 2**32 - 1")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature is {temperature}; give 0 (most likely token) or a positive number")
        return self._generator.stream(self.params, ids_BL, max_new_tokens, temperature, seed)

    def _checked_ids(self, ids_BL) -> np.ndarray:
        ids = np.asarray(ids_BL)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
            raise ValueError(
                f"ids_BL has shape {ids.shape} and dtype {ids.dtype}; give a non-empty 2-D array of integers "
                f"[sequences, positions]"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"ids_BL holds {ids.min()} .. {ids.max()}; token ids of this model are 0 .. "
                f"{self.config.vocab_size - 1}: was the text made by another tokenizer?"
            )
        return ids.astype(np.int32)


def _resolve_deployment(deployment: str | DeploymentConfig) -> DeploymentConfig:
    return parse_deployment(deployment) if isinstance(deployment, str) else deployment


def load(path: str | Path, deployment: str | DeploymentConfig = "single") -> Model:
    """Open a checkpoint of ours (a run folder, its checkpoints folder, or one step's folder) in a deployment.

    deployment: a name ("ep16"), sizes ("pipe=2,tensor=8") or a DeploymentConfig; it need not be the one that
    wrote the checkpoint. Only the weights are read. Raises ConfigError (a ValueError) for a deployment that
    does not fit the model or the devices, CheckpointError for a folder that is no checkpoint of ours.
    """
    checkpoint = open_checkpoint(path)
    model_config = from_dict(checkpoint.meta["config"], f"{checkpoint.path}: config").model
    config = _resolve_deployment(deployment)
    check_deployment(model_config, config)
    placed = create(model_config, config)
    params = checkpoint.restore_params(placed.abstract_params())
    cast = jax.jit(lambda p: cast_for_compute(p, model_config))(params)
    return Model(placed, lambda: cast)


def build(run_config: RunConfig) -> tuple[Model, Callable[[dict], dict]]:
    """A fresh model and its training step, for training from Python.

    ``step(batch)`` takes {"ids_BL", "targets_BL"}: int32 [B, L] with B = train.batch_size, does one optimizer
    step, and returns the metrics (see train.step.Trainer.step) as numpy values; ``model`` then has the new
    weights. Raises ConfigError before anything is compiled if the config cannot run.
    """
    check_run(run_config)
    deployment = create(run_config.model, run_config.deployment, zero_params=run_config.train.zero_params)
    trainer = Trainer(deployment, run_config.train)
    to_use = _layout_of_use(deployment)
    state = trainer.init_state()
    model = Model(deployment, lambda: to_use(state["params"]))

    def step(batch: dict) -> dict:
        nonlocal state
        state, metrics = trainer.step(state, batch)
        model.renew(lambda: to_use(state["params"]))
        return jax.device_get(metrics)

    return model, step


def _layout_of_use(deployment: Deployment) -> Callable[[dict], dict]:
    """The jitted function from parameters at rest to parameters as multiplied, in the layout of use."""
    gather = deployment.shard_map(
        lambda params: gather_params(params, deployment.layouts, deployment.axes, deployment.model_config),
        (deployment.specs(at_rest=True),),
        deployment.specs(at_rest=False),
    )
    return jax.jit(gather)

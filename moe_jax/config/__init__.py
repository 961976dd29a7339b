"""The configuration of a run: dataclasses, loading, checks. Nothing here imports jax.

The command line is in :mod:`moe_jax.config.cli`, which is imported by scripts only.
"""

from moe_jax.config.checks import check_data, check_deployment, check_model, check_run, check_train
from moe_jax.config.errors import ConfigError, Problem
from moe_jax.config.fields import from_dict, mesh_label, to_dict
from moe_jax.config.load import ResolvedRun, load_model, load_run, parse_deployment
from moe_jax.config.schema import DataConfig, DeploymentConfig, ModelConfig, RunConfig, TrainConfig

__all__ = [
    "ConfigError",
    "DataConfig",
    "DeploymentConfig",
    "ModelConfig",
    "Problem",
    "ResolvedRun",
    "RunConfig",
    "TrainConfig",
    "check_data",
    "check_deployment",
    "check_model",
    "check_run",
    "check_train",
    "from_dict",
    "load_model",
    "load_run",
    "mesh_label",
    "parse_deployment",
    "to_dict",
]

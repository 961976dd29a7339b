"""Deployments: the only place that joins the model with the parallel mechanisms.

``create(model_config, deployment_config)`` gives a Deployment: a mesh, the layout of every parameter on it,
and the per-device program. A new deployment is new axis sizes (and, at most, a row in the rule table).
"""

from moe_jax.deployments.deployment import Deployment, create

__all__ = ["Deployment", "create"]

"""Checkpoints: saved by the deployment that trains, restored bit for bit into any other."""

from moe_jax.checkpoint.errors import CheckpointError
from moe_jax.checkpoint.reader import Checkpoint, open_checkpoint
from moe_jax.checkpoint.store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointError", "CheckpointStore", "open_checkpoint"]

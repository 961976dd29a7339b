"""Parallel mechanisms: meshes, sharding rules, exchanges, the pipeline. They know nothing of transformers."""

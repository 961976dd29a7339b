"""Do deployments compute the same thing, and at what cost? One checkpoint, the same tokens, side by side."""

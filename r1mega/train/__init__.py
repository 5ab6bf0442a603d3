"""The training run: sharding, checkpoints, metrics, progress and the loop that ties them together."""

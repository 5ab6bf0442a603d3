"""Layers cut over the tensor-parallel group, with the sequence cut between them (sequence parallelism)."""

"""Optimizer, learning-rate schedules, and gradients across layouts."""

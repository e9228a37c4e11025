"""Measuring models: tasks, metrics and the harness that runs them."""

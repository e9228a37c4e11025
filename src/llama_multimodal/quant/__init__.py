"""Smaller and faster weights: a built model's linear layers, packed in place."""

"""Checkpoints on disk: reading, checking, converting and writing them."""

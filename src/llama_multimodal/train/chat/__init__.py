"""Conversations for fine-tuning: read from files, mixed, encoded by a checkpoint's own processor, step by step."""

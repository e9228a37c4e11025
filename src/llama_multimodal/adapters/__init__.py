"""LoRA: small trainable additions to a frozen model, switched, merged, saved and read in PEFT's format."""

"""Adapters: the small trainable part. What they are (oft, lora), where they sit (layout), how they travel (peft_io)."""

"""Load a decoder, make it bidirectional, add LoRA, pool, merge and export."""

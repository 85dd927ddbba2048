"""Load a decoder, make it bidirectional, put LoRA on it, pool, merge and export."""

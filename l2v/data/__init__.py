"""Sources, tokens, examples, batches. Knows a tokenizer, never a model."""

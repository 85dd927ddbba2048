"""Sources, tokens, examples, batches. It imports tokenizers, never models."""

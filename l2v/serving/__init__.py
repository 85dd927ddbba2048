"""A small server of vectors with OpenAI's interface, for evaluation and development."""

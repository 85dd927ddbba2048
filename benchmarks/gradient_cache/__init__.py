"""A contrastive step with and without the gradient cache."""

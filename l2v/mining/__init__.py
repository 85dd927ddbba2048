"""Hard negatives for pairs: candidates, a filter that knows the positive, a report of the scores."""

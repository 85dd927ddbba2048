"""Hard negatives for pairs: candidates, a positive-aware filter, and a report of the scores."""

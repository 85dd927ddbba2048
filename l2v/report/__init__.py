"""One page about runs: loss curves, scores, speed, lineage and data."""

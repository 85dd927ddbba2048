"""A run on disk: the only code that knows which files a run folder holds, and what stands in them."""

"""A run on disk: the only code that knows the files of a run folder and their content."""

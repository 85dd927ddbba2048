"""Vectors of whole files: streamed, resumable, over several processes; and such a file as a search index."""

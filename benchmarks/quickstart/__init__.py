"""Trials of the quickstart's recipe that never see its held-out questions."""

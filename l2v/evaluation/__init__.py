"""Scores and pictures of encoders."""

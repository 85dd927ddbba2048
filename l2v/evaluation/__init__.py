"""Scores and pictures. Knows encoders only."""

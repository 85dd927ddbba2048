"""Losses: MNTP and contrastive. This package depends on neither data nor models."""

"""What is minimised: MNTP and the contrastive losses. Knows neither data nor models."""

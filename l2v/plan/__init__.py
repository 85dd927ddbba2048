"""Predict the memory and speed of a recipe: bytes tensor by tensor, time by the roofline model."""

"""Answers and what they are worth: generation, likelihood, metrics, resampling. It knows data and weights."""

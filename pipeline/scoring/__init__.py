"""Answers and what they are worth: generation, likelihood, metrics, resampling, a judge. It knows data and weights."""

"""Generating answers and scoring them: likelihood, metrics, bootstrap intervals. It may import data and weights."""

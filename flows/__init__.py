"""Prefect flows over the stages: order, time and place. What a stage does is in `pipeline`."""

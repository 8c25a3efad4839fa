"""The stages of a retraining: plain functions from typed parameters and paths to files. Imports no Prefect."""

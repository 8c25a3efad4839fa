"""The local servers behind the dashboard (Prefect, its workers, MLflow) and the events sent to them.

It may import core and params.
"""

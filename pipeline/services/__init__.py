"""The local servers behind the dashboard: Prefect, its workers, the registry, and what they are told.

It knows core and params.
"""

"""What every part stands on: files, processes, git, DVC, http, the lock of a run, redaction.

It imports nothing of the project but itself. Results depend on little of it, which `dependencies.SHAPING` names.
"""

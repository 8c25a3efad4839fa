"""What every part stands on and no result depends on: files, processes, git, DVC, http, the lock of a run, redaction.

It imports nothing of the project but itself.
"""

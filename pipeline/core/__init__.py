"""The base of all other parts: files, processes, git, DVC, http, the run lock, redaction.

It imports nothing else of the project. The few modules that shape results are listed in `dependencies.SHAPING`.
"""

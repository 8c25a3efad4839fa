"""The `retune` command: data, models, runs, versions, talk.

It may import everything; nothing imports it.
"""

"""The `retune` command, by what people do: data, models, runs, versions, talk.

It may import everything; nothing imports it.
"""

"""Instruction data: sources, formats, snapshots, duplicates, and the encoding of rows as tokens.

Imports core, params and chat.
"""

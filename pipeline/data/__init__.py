"""Instruction data: its sources, its formats, and the way of each row from a record to tokens.

Imports core, params and chat.
"""

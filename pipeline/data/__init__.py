"""Instruction data: where it comes from, the forms it has, and what becomes of each row, up to its tokens.

It knows chat.
"""

"""How an adapter is trained: methods, packed sequences, loss, the trainer, its checkpoints, and the plan.

It may import weights, and everything that weights may import.
"""

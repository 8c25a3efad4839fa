"""How an adapter is trained: methods, sequences, loss, the trainer, its checkpoints, and the plan.

It knows data and weights.
"""

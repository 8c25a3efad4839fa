"""What `train` is made of: methods, sequences, loss, the trainer, its checkpoints, and what is watched meanwhile."""

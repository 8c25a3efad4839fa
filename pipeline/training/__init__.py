"""What `train` is made of: sequences, loss, the trainer, its checkpoints, and what is watched while it runs."""

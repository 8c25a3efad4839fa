"""What `train` is made of: methods and what they can be combined with, classification, starts from an adapter."""

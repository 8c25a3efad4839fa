"""Versions: the artifact store, manifests and signatures, the gate and its statistics, the promotion log, MLflow.

`model.RegisteredModel` holds store, log and registry of one model together. The folder may import scoring and training.
"""

"""Versions: the artifact store, manifests and signatures, the gate and its statistics, the promotion log, MLflow.

It knows scoring and training.
"""

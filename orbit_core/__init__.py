"""Orbit's own system: recipes, steps, artifacts, checkpoints, adapters, parity and the RL loop.

Knows nothing of Prefect or Kubernetes. What a pod or a subprocess runs is `python -m orbit_core step NAME`.
"""

__version__ = "0.1.0"

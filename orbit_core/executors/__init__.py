"""Executors run steps somewhere: same spec, same artifact, wherever."""

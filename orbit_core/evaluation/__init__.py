"""How good the model is, before and after, and how sure one can be of it."""

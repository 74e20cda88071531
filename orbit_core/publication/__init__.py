"""What leaves Orbit: the adapter, how it came to be, and on request the model with the adapter merged in."""

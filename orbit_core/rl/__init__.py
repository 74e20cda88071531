"""RL: what a step is (loop), what it learns from (rewards, shaping, losses), and how it is kept (recorder)."""

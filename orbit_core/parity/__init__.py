"""The parity gate: what must be equal between checkpoint, trainer and rollout engine, measured and judged."""

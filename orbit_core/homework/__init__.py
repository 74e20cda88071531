"""The base model of the demo: a small Qwen3 that learned arithmetic from sloppy homework.

Reinforcement learning amplifies a right behaviour that a model has but seldom prefers. The homework makes exactly such
a model: the column work is right in form, and right in content about a third of the time, because most carries are
forgotten.
"""

"""Transformers models with packed linears: the skeleton is transformers', the weights are a checkpoint's bytes."""

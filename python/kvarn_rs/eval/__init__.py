"""Metrics of how far a quantized cache changes a model's outputs. Needs torch."""

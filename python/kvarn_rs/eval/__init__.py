"""How far does a quantized cache move a model's answers? The measures; needs torch."""

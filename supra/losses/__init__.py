"""Next-token and distillation losses, in chunks that never hold all logits of a batch."""

"""From a pretrained checkpoint to a converted one: plan, choose layers, calibrate, inspect."""

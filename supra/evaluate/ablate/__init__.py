"""What each part of a converted model costs: floors, layers, look-back, recall, labels."""

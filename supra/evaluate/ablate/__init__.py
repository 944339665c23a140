"""What each part of a converted model contributes: floors, layers, look-back, recall, labels."""

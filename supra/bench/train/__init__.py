"""`supra bench train`: the speed of training, and where the time of a step goes."""

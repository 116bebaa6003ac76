"""Changing weights by gradients: one loop, distillation, pretraining."""

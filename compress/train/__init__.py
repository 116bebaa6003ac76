"""Changing weights by gradients: one loop, distillation whole and by blocks, pretraining."""

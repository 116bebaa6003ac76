"""compress: the best smaller language model that fits a memory budget, found, made and proved."""

"""From a decision to tensors: units, candidates, masks, surgery, repair, rounding."""

"""A model visited layer by layer: where it is worked on, its layers, the states in flight."""

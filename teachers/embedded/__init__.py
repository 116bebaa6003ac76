"""The embedded teacher: a small hybrid trained by ``compress pretrain`` on runs/embedded.yaml."""

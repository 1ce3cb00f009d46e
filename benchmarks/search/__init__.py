"""A search for an AFD that is more robust at the same cost, over cheap runs on MNIST and their validation images."""

"""What commands run, above training and evaluation: `train` and `curves`."""

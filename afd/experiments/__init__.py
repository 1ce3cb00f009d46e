"""What commands run, above training and evaluation: runs of one or several seeds, and comparisons of methods."""

"""Studies: the experiments behind the results, and how the embedded model was made."""

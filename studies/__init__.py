"""Studies: the experiments behind the results, and how the embedded models were made."""

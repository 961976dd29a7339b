"""Training: text, batches, metrics, the folder of a run, and the loop over them."""

"""Array operations that know neither the model nor a mesh: attention, grouped products, rows by expert."""

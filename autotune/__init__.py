"""Config spaces, devices, cost model, store, search and tuner. Knows no kernel and no op."""

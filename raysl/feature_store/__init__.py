"""Features on disk, written by extraction and read by probes and clustering. Free of torch; see `store`."""

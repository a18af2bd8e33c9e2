"""From media files to batches: decoding, preparation, shards, data sets."""

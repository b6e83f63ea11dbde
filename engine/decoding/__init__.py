"""Running a model over sequences that grow: decoders, packed weights, caches. No text."""

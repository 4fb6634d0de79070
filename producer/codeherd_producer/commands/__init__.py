"""The command line's verbs and nouns, one per file; `codeherd_producer.cli` knows which there are."""

"""Token ids in, token ids out. Knows nothing of queues, tables, processes or JSON."""

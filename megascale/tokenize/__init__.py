"""Audio to token shards."""

"""A cache on disk: manifest, plan, shards, commits, statistics."""

"""A corpus of any size becomes a folder of Parquet shards."""

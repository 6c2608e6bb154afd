"""Fine-tuning texts for the commands: read from files, shards or the hub, tokenised, masked, put into batches."""

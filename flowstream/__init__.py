"""flowstream: online FLOW for any data loader."""

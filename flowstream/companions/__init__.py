"""What FLOW is compared and combined with: other ways to forget less, each a few lines around the stream."""

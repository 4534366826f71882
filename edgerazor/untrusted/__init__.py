"""What strangers' bytes pass through on their way in, one file a kind."""

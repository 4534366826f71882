"""What several test files need, each thing once."""

"""What is packed, loaded and told on the command line."""

"""What is refused, cleaned or blacked out before it is loaded, shipped or shown."""

"""What `make bench` runs: figures beside a named peer on the same work."""

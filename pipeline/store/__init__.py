"""The artifact store: immutable objects in a folder or a bucket, and files moved to it and back."""

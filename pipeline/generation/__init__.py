"""How answers are made: rows that come and go in one batch, other backends, and answers kept through a kill."""

"""Local `evaluate` modules, loaded by path: the Hub's need a network. Each returns a score for every item as well."""

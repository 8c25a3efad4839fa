"""Conversations as a model reads them: templates, tokens, labels and the contract that holds them together."""

"""The evaluation report: what is in it, and its pages. The stage writes what it knows, `whole` all of a decision."""

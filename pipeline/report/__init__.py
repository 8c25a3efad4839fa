"""Tables and pages for people: scores, and the gate's decision. It may import the registry."""

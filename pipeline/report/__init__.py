"""What people look at: tables and pages of scores and of a decision. It knows the registry."""

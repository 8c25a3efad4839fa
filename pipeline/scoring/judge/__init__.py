"""A judge in the manner of MT-Bench: a strong model rates answers to open questions, alone and against each other."""

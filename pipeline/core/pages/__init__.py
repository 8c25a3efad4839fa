"""What the HTML and Markdown reports have in common: their style, and how foreign text is put into them."""

"""Published versions: what describes, signs, lists, compares and retires them."""

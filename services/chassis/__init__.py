"""What every service shares; no word of any business is in it."""

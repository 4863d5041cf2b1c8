"""How fast networks run on this machine."""

"""What the scripts lean on. Nobody needs to read it to train."""

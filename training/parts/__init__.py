"""What the scripts of this folder share. Nothing here is run by itself."""

"""Files and folders that survive a stop at any moment: written whole, sealed, owned by one kind of stage."""

"""From files and the hub to rows, and from rows to pairs: what is not understood is refused by row."""

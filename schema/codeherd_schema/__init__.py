"""The ground floor of codeherd: words, wire and rows. Imports neither torch nor a command line."""

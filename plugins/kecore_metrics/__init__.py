"""The families of metrics that ship with kecore, found through entry points like anyone else's."""

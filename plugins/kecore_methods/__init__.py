"""The editing methods that ship with kecore, found through entry points like anyone else's."""

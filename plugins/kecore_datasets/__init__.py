"""The data-set layouts that ship with kecore, found through entry points like anyone else's."""

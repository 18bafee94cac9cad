"""The studio: a local web page on which facts are edited, and seen before and after."""

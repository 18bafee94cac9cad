"""The contract: what crosses kecore's boundaries, and what a method, a stage or a data set has to be.

Imports nothing of kecore but itself, so that whoever has read it knows all that a plugin must know.
"""

"""Locate-then-edit methods: closed-form updates of the feed-forward memories."""

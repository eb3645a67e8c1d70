"""Readers of released dictionaries, one family a module; `saekit.hub.table` lists them all."""

"""The command ``lightning-gcsr``."""

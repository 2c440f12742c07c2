"""The command ``lightning-gcsr``. It imports neither Lightning nor torchmetrics, and torch only to read a file."""

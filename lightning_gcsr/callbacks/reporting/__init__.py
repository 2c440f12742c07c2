"""What callbacks send to loggers: charts, images, tables, hyperparameters."""

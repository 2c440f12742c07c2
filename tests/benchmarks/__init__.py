"""What the plugin costs, as ratios within one run; scripts to be run by hand, whose tables are in the docs."""

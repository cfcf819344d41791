"""What repeats single tables, figures and data sets of the papers."""

"""Tables, plots and HTML pages of runs, comparisons and studies."""

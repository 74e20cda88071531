"""One HTML file that shows a run: no script, no request to anywhere, readable by day and by night."""

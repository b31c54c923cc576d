"""The page of a checkpoint, the index of a run's pages, and the history of its numbers.

page     one self-contained HTML file a checkpoint, and the index
verdict  better, same or worse: what the page says first
gather   what a page shows, read from the run's folders into plain values
charts   line charts and the grid's trade-off as SVG
history  every result of a run as one table
"""
